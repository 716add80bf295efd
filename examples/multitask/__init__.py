"""Does MultiLoRA learn several tasks at once better than LoRA? A study on a small model, run as
``python -m examples.multitask`` from a checkout."""
