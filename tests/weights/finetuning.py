"""Fine-tunes a BatchNorm network on other classes: ``python -m tests.weights.finetuning --help``.

Each run is one of the training program, in a folder of its own. Every finished run is a line of
the results, which a repeated command does not compute again.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent.parent
CONFIG = ROOT / "configs" / "cifar10_folder_resnet20.py"
SEEDS = (0, 1, 2)
BATCHES = {"8": 8, "128 in parts of 8": 128}
RATES = (0.003, 0.01, 0.03, 0.1)
METHODS = {
    "batchnorm": {"method": "batchnorm", "method_options.bn_sync": "local"},
    "frozen": {"method": "batchnorm", "method_options.frozen": "true"},
    "folded": {"method": "lastbn"},
}
PART = 8


def flags(method, batch, rate, seed, args):
    size = BATCHES[batch]
    parts = size // PART
    fields = {
        **METHODS[method],
        "data.dir": args.images,
        "init_from": args.base,
        "epochs": args.epochs,
        "eval_every": args.epochs,
        "schedule.name": "cosine",
        "schedule.warmup_epochs": args.epochs / 10,
        "batch_size": size,
        "learning_rate": rate,
        "seed": seed,
        "log_every": 20,
    }
    # BatchNorm takes no micro-batches: its parts are on as many virtual devices.
    fields |= {"num_devices": parts} if method == "batchnorm" else {"micro_batches": parts}
    if method != "batchnorm":
        fields["num_devices"] = 1
    return [f"--config.{name}={value}" for name, value in fields.items()], parts


def run(method, batch, rate, seed, args):
    given, parts = flags(method, batch, rate, seed, args)
    devices = parts if method == "batchnorm" else 1
    name = f"{method}-{BATCHES[batch]}-{rate}-s{seed}"
    workdir = args.workdirs / name
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-m", "mimicnorm_jax.main", f"--config={CONFIG}", *given]
    subprocess.run(
        [*command, f"--workdir={workdir}"],
        check=True,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    summary = json.loads((workdir / "summary.json").read_text())
    kept = ("final_test_accuracy", "final_test_accuracy_recalibrated", "final_train_loss", "steps")
    return {name: summary[name] for name in (*kept, "init_sha256")} | {
        "seconds": round(summary["seconds"])
    }


def table(cells):
    """Markdown: each way at its best rate of seed 0: mean and deviation over the seeds."""
    lines = [
        "| batch | way | rate | test accuracy, % | exact statistics, % |",
        "|---|---|---|---|---|",
    ]
    for batch in BATCHES:
        for method in METHODS:
            of_way = [c for c in cells if (c["batch"], c["method"]) == (batch, method)]
            rates = {c["rate"]: c["final_test_accuracy"] for c in of_way if c["seed"] == 0}
            if not rates:
                continue
            rate = max(rates, key=rates.get)
            chosen = [c for c in of_way if c["rate"] == rate]

            def said(field, chosen=chosen):
                values = [100 * c[field] for c in chosen if c[field] is not None]
                if not values:
                    return ""
                spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
                return f"{statistics.mean(values):.2f}{spread} ({len(values)})"

            fields = ("final_test_accuracy", "final_test_accuracy_recalibrated")
            lines.append(f"| {batch} | {method} | {rate} | {' | '.join(map(said, fields))} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", help="the run to start from")
    parser.add_argument("--images", help="a folder of images of other classes")
    parser.add_argument("--workdirs", type=pathlib.Path, help="where the runs go")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--batches", nargs="*", default=list(BATCHES))
    parser.add_argument("--rates", nargs="*", type=float, default=RATES)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a JSON file")
    parser.add_argument("--table", action="store_true", help="print a finished file only")
    args = parser.parse_args()
    cells = json.loads(args.out.read_text()) if args.out.exists() else []
    if args.table:
        return print(table(cells))

    def keep(**cell):
        done = next((c for c in cells if all(c.get(k) == v for k, v in cell.items())), None)
        if done is None:
            found = run(cell["method"], cell["batch"], cell["rate"], cell["seed"], args)
            done = cell | {"epochs": args.epochs} | found
            cells.append(done)
            args.out.write_text(json.dumps(cells, indent=0))
            print(done, flush=True)
        return done["final_test_accuracy"]

    for batch in args.batches:
        best = {}
        for method in METHODS:
            by_rate = {r: keep(method=method, batch=batch, rate=r, seed=0) for r in args.rates}
            best[method] = max(by_rate, key=by_rate.get)
        for seed in SEEDS[1:]:
            for method, rate in best.items():
                keep(method=method, batch=batch, rate=rate, seed=seed)


if __name__ == "__main__":
    main()
