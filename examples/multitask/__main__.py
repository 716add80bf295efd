"""``python -m examples.multitask``: run what is missing of the study, then write the report."""

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.multitask", description=__doc__)
    parser.add_argument("--output", type=Path, help="folder of the results (default: results, quick: quick-results)")
    parser.add_argument("--quick", action="store_true", help="every part once, small, in under 10 minutes")
    parser.add_argument("--report-only", action="store_true", help="run nothing: write the report of what is there")
    parser.add_argument("--list", action="store_true", help="run nothing: name the finished runs and the next one")
    parser.add_argument("--max-runs", type=int, help="stop after so many runs")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parser.parse_args()
    for name in ("threads", "max_runs"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(options, name)}.")
    folder = options.output or HERE / ("quick-results" if options.quick else "results")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries about each other
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # where installed, it is loaded but not used
    try:
        _study(options, folder)
    except ValueError as error:
        print(f"multitask: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nInterrupted: finished runs are kept, the same command goes on.", file=sys.stderr)
        sys.exit(130)


def _study(options: argparse.Namespace, folder: Path) -> None:
    import torch

    from examples.multitask.execute import read_results, run_missing
    from examples.multitask.page import report
    from examples.multitask.plan import Study, next_run, quick
    from multilora_fast.devices import choose_device, choose_dtype

    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    recorded = next(iter(read_results(folder / "runs", None).values()), None)  # another machine goes on in its dtype
    native = str(choose_dtype("auto", device)).removeprefix("torch.")
    dtype = recorded["settings"]["dtype"] if recorded else native
    study = quick(dtype) if options.quick else Study(dtype=dtype)
    done = read_results(folder / "runs", study)
    if options.list:
        print(*done, sep="\n")
    elif not options.report_only and next_run(study, done) is not None:
        run_missing(folder / "runs", study, _bench(study, device), done, options.max_runs)
    if not options.list:
        report(folder, study, done)
        print(f"Wrote {folder / 'README.md'}.")
    missing = next_run(study, done)
    print("The study is complete." if missing is None else f"Next: {missing.name}.")


def _bench(study, device):
    import torch

    from examples.multitask.data import real_tasks, split
    from examples.multitask.execute import Bench
    from examples.multitask.methods import prepared
    from multilora_fast.models import load_model, load_tokenizer

    print("Loading the model and the tasks ...", flush=True)
    tokenizer = load_tokenizer(None)
    return Bench(prepared(load_model(None, torch.float32, device)), tokenizer, split(real_tasks(), study, tokenizer))


if __name__ == "__main__":
    main()
