"""Made-up tasks of a study."""

from multilora_fast.demo.tasks import Example, Task


def made_up(name: str, options: tuple[str, ...], start: int) -> Task:
    def example(i: int, extra: str = "") -> Example:
        return Example(name, f"the w{start + i % 20} is w{i % 41} ?{extra}", options, i % len(options))

    held_out = [example(i) for i in range(20, 40)]
    train = [example(i) for i in range(20)] + [example(i, "\nthe same line") for i in range(25, 30)]
    return Task(name, train, held_out + held_out[:5])
