"""The study's GPU profile: a hundred times the tokens of the CPU profile, and the paper's variants."""

from examples.multitask.plan import Study

TOKENS = 2_000_000  # least tokens of a run
COUNTED = (2827, 3000, 717, 2584, 3000, 643, 981, 1050)  # test items of the tasks with at least ``least_items``


def gpu(dtype: str) -> Study:
    """Total rank 96 in 3 branches and 160 in 5, as in the paper, each against LoRA of the same rank."""
    lora, branches, few = (2e-4, 5e-4, 1e-3), (1e-3, 2e-3, 5e-3), (1e-3, 2e-3)
    return Study(
        steps=500, batch_size=64, max_length=512, validation_items=100, test_items=3000, seeds=6, total_rank=96,
        rates={
            "lora": lora, "multilora-3": branches, "lora-160": lora, "multilora-5": branches,
            "full": (1e-5, 3e-5, 1e-4),
            "task-arithmetic": lora, "lora-alone": lora, "multilora-3-alone": branches,
            "multilora-3-scalar": few, "multilora-3-zero": few, "multilora-3-scalar-zero": few,
        },
        compared_rounds=0, dtype=dtype, ranks={"lora-160": 160, "multilora-5": 160}, micro_tokens=16_384,
        least_items=600, first_tested=1, guess=60.0,
    )  # fmt: skip
