"""Run the missing runs of the study, then write the report: ``python -m examples.multitask``."""

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path

from examples.multitask import workers

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.multitask", description=__doc__)
    parser.add_argument("--output", type=Path, help="folder of the results (default: by the profile)")
    parser.add_argument("--profile", choices=("cpu", "gpu"), default="cpu", help="the scale (default: cpu)")
    parser.add_argument("--prepared", type=Path, help="output of python -m examples.multitask.prepare, for gpu")
    parser.add_argument("--quick", action="store_true", help="a small run of every part; under 10 minutes on a CPU")
    parser.add_argument("--report-only", action="store_true", help="write the report of the finished runs only")
    parser.add_argument("--no-report", action="store_true", help="execute runs only; the report takes a minute or two")
    parser.add_argument("--list", action="store_true", help="list the finished runs and the next one only")
    parser.add_argument("--max-runs", type=int, help="maximum number of runs")
    parser.add_argument("--minutes", type=float, help="time limit; no run begins that is expected to exceed it")
    parser.add_argument("--workers", type=int, default=1, help="concurrent runs on the device")
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--eager", action="store_true", help="on a GPU, replay no captured training steps")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parser.parse_args()
    if (options.profile == "gpu") != (options.prepared is not None):
        parser.error("--profile gpu, and no other, takes --prepared FOLDER.")
    if options.report_only and options.no_report:
        parser.error("--report-only and --no-report exclude each other.")
    if options.minutes is not None and options.minutes <= 0:
        parser.error(f"--minutes must be above 0, not {options.minutes:g}.")
    for name in ("threads", "max_runs", "workers"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(options, name)}.")
    default = ("quick-" if options.quick else "") + ("gpu-" if options.profile == "gpu" else "") + "results"
    folder = options.output or HERE / default
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if options.prepared:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a prepared folder has all that a run reads
    several = options.workers > 1 and not (options.list or options.report_only)
    try:
        with workers.started(options.workers) if several else nullcontext() as pool:
            try:
                _study(options, folder, pool)
            except BaseException:
                workers.ended()
                raise
    except ValueError as error:
        print(f"multitask: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(getattr(error, "status", 2))
    except KeyboardInterrupt:
        print("\nInterrupted: finished runs are kept, the same command goes on.", file=sys.stderr)
        sys.exit(130)


def _study(options: argparse.Namespace, folder: Path, pool) -> None:
    from functools import partial

    from examples.multitask.execute import read_results
    from examples.multitask.loading import load_bench
    from examples.multitask.page import report
    from examples.multitask.plan import Study, next_run, quick
    from examples.multitask.profile import gpu
    from examples.multitask.schedule import run_missing, run_side_by_side
    from multilora_fast.console import quiet
    from multilora_fast.devices import choose_device, choose_dtype

    quiet()
    device = choose_device(options.device)
    recorded = next(iter(read_results(folder / "runs", None).values()), None)  # keep its dtype on another machine
    native = str(choose_dtype("auto", device)).removeprefix("torch.")
    dtype = recorded["settings"]["dtype"] if recorded else native
    study = gpu(dtype) if options.profile == "gpu" else Study(dtype=dtype)
    study = quick(study) if options.quick else study
    done = read_results(folder / "runs", study)
    graphs = device.type == "cuda" and not options.eager
    load = partial(load_bench, study, device, options.prepared, options.threads, graphs=graphs)
    if options.list:
        print(*done, sep="\n")
    elif not options.report_only and next_run(study, done) is not None:
        limits = {"limit": options.max_runs, "minutes": options.minutes}
        print("Loading the model and the tasks ...", flush=True)
        if pool is None:
            run_missing(folder / "runs", study, load(), done, **limits)
        else:
            run_side_by_side(folder / "runs", study, load, done, workers=options.workers, pool=pool, **limits)
    if not (options.list or options.no_report):
        report(folder, study, done)
        print(f"Wrote {folder / 'README.md'}.")
    missing = next_run(study, done)
    print("The study is complete." if missing is None else f"Next: {missing.name}.")


if __name__ == "__main__":
    main()
