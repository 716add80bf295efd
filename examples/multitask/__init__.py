"""A study of MultiLoRA and LoRA on a mixture of tasks, run as ``python -m examples.multitask`` from a checkout."""
