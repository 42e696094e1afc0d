"""Hurts runs at random moments and makes sure that nothing is lost but time.

    python -m tests.chaos.harness --sigkills 40 --others 24 --workers 2 \\
        --json results/resilience/chaos.json

Runs of one process and of two are hurt, resumed with the same command, and hurt again, until they
end; then their state must be that of a run that nobody hurt, bit for bit. A run of two is hurt in
one of its processes, chosen at random: the other has to end by itself. No process may be left.

Beside SIGKILL: SIGTERM, SIGINT and SIGHUP, which save; a stop while the step compiles; SIGSTOP for
some seconds, after which the run goes on; and a limit on the size of files, as a full disk.
"""

import argparse
import json
import pathlib
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from tests.runs import (
    TINY,
    Run,
    descendants,
    logged_step,
    rows,
    saved_steps,
    still_alive,
    summary,
)

LOG_EVERY = 3  # so that checkpoints come between two lines of metrics, too
# 23 steps an epoch; a checkpoint every 5 steps, an evaluation every 11
RUN = (
    *TINY,
    *("--config.checkpoint_every=0.2", "--config.eval_every=0.5", "--config.keep_checkpoints=3"),
    f"--config.log_every={LOG_EVERY}",
    # averages are a part of the state, and each evaluation estimates their statistics
    *("--config.optimizer.ema_decay=0.9", "--config.optimizer.ema_batches=2"),
)
SAVES = ("sigterm", "sigint", "sighup")
OTHERS = (*SAVES, "compiling", "sigstop", "full")
TIMED = ("images_per_second", "input_wait_fraction")
_SECONDS_TO_END = 60


def saving(workdir):
    """Whether a checkpoint is half written."""
    folder = workdir / "checkpoints"
    try:
        return any("orbax-checkpoint-tmp" in path.name for path in folder.iterdir())
    except OSError:
        return False


def untimed(workdir):
    return [{k: v for k, v in row.items() if k not in TIMED} for row in rows(workdir)]


class Chaos:
    """Kills one kind of run until the wanted number of kills is reached."""

    def __init__(self, folder, count, arguments, draw, say):
        self.folder = folder
        self.count = count
        self.arguments = arguments
        self.draw = draw
        self.say = say
        self.report = {
            "processes": count,
            "sigkill": 0,
            "sigkill_during_a_save": 0,
            **dict.fromkeys(OTHERS, 0),
            "resumes": 0,
            "runs": 0,
            "most_steps_lost_by_sigkill": 0,
            "most_steps_lost_by_a_stop": 0,
            "slowest_stop_s": 0.0,
            "slowest_stop_while_compiling_s": 0.0,
            "processes_left": 0,
            "mismatches": 0,
        }

    def start(self, name, *more, **environment):
        arguments = (*self.arguments, *more, f"--workdir={self.folder / name}")
        return Run(self.folder / f"{name}-output", *arguments, count=self.count, **environment)

    def whole(self):
        """The run that nobody kills."""
        with self.start("whole") as run:
            run.succeeds(600)
        self.expected = summary(self.folder / "whole")
        self.expected_rows = untimed(self.folder / "whole")

    def hurt(self, name, kind, during_save=False):
        """Waits for a random moment after the first checkpoint, and hurts one process.

        Returns whether that came in time: the run may have come to its end before.
        """
        workdir = self.folder / name
        if kind == "compiling":
            return self.stop_the_compiler(name)
        with self.start(name) as run:
            begins = saved_steps(workdir)[-1] if saved_steps(workdir) else 0
            victim = run[self.draw.randrange(self.count)]

            def under_way():
                return bool(saved_steps(workdir)) and "compiled and ran" in run.output()

            try:
                run.wait_until(under_way, 300)
                aim = begins + self.draw.randrange(1, 40)
                run.wait_until(lambda: logged_step(workdir) >= aim, 300)
                if during_save:
                    run.wait_until(lambda: saving(workdir), 300, period=0.0)
                else:
                    time.sleep(self.draw.random() * 0.1)
            except AssertionError:
                codes = run.wait(_SECONDS_TO_END)
                if any(codes):
                    raise
                return False  # it came to its end first
            family = [pid for process in run.processes for pid in descendants(process.pid)]
            if kind == "sigstop":
                return self.stand_still(run, victim)
            if kind == "full":
                resource.prlimit(run[0].pid, resource.RLIMIT_FSIZE, (2000, 2000))
            else:
                victim.send_signal(getattr(signal, kind.upper()))
            began = time.monotonic()
            codes = run.wait(_SECONDS_TO_END)
            seconds = time.monotonic() - began
            self.count_left(family)
            cut = saving(workdir)  # what was half written when it died; by now nobody writes
            kept = saved_steps(workdir)[-1]
            reached = max(logged_step(workdir), kept)
            if not self.is_as_it_should_be(kind, run, codes, workdir):
                return False
        lost = reached - kept
        if kind in SAVES:
            self.most("slowest_stop_s", seconds)
            self.most("most_steps_lost_by_a_stop", lost)
        if kind == "sigkill":  # what was done after the last line of metrics, at most
            lost = max(0, logged_step(workdir) + LOG_EVERY - 1 - kept)
            self.most("most_steps_lost_by_sigkill", lost)
            self.report["sigkill_during_a_save"] += cut
        self.report[kind] += 1
        self.say(
            f"{self.count} process(es), {name}: {kind} at step {reached} or soon after"
            + (" during a save" if cut else "")
            + f", ended {codes} after {seconds:.1f} s, kept {saved_steps(workdir)}"
        )
        return True

    def is_as_it_should_be(self, kind, run, codes, workdir):
        """Whether a process ended by what hurt it, and not because the run was over."""
        if kind in SAVES:
            if "finished" in run.output() or (workdir / "summary.json").exists():
                return False
            if any(codes) or "resume with the same command" not in run.output():
                raise AssertionError(f"{kind}: {codes} {run.everything()}")
            return True
        if not any(codes):
            return False
        answered = codes[0] == 1 and "error: " in run.errors() and "Traceback" not in run.errors()
        if kind == "full" and not answered:
            raise AssertionError(f"{kind}: {codes} {run.everything()}")
        return True

    def stop_the_compiler(self, name):
        """A stop of one process while the first step compiles: all answer at once."""
        with self.start(name, "--config.compilation_cache=", **self.no_cache()) as run:
            try:
                run.wait_until(lambda: "compiling the training step" in run.output(), 300)
            except AssertionError:
                if any(run.wait(_SECONDS_TO_END)):
                    raise
                return False
            family = [pid for process in run.processes for pid in descendants(process.pid)]
            run[self.draw.randrange(self.count)].send_signal(signal.SIGTERM)
            began = time.monotonic()
            codes = run.wait(_SECONDS_TO_END)
            seconds = time.monotonic() - began
            if any(codes) or "before a step; resume with the same command" not in run.output():
                raise AssertionError(f"compiling: {codes} {run.everything()}")
            if seconds > 10:  # 5 where nothing else computes
                raise AssertionError(f"a stop while compiling took {seconds:.1f} s")
            self.count_left(family)
        self.most("slowest_stop_while_compiling_s", seconds)
        self.report["compiling"] += 1
        self.say(f"{self.count} process(es), {name}: stopped while compiling in {seconds:.1f} s")
        return True

    def no_cache(self):
        """An empty folder for compiled programs, so that there is something to compile."""
        return {"JAX_COMPILATION_CACHE_DIR": tempfile.mkdtemp(dir=self.folder)}

    def stand_still(self, run, victim):
        """SIGSTOP for some seconds: the run goes on, and comes to its end or is hurt again."""
        victim.send_signal(signal.SIGSTOP)
        time.sleep(3.0)
        victim.send_signal(signal.SIGCONT)
        output = run.succeeds(600)
        self.report["sigstop"] += 1
        self.say(f"{self.count} process(es): stood still for 3 s, and came to its end")
        assert "summary" in output
        return None  # it has ended: nothing to resume

    def count_left(self, family):
        """Counts the processes below those of the run that outlive it for more than 10 s."""
        self.report["processes_left"] += len(still_alive(family))

    def most(self, name, value):
        """Notes the greatest of several numbers."""
        self.report[name] = max(self.report[name], value)

    def finish(self, name):
        """Resumes a run that was killed, and compares its end."""
        with self.start(name) as run:
            output = run.succeeds(600)
        got = summary(self.folder / name)
        same = (
            got["state_sha256"] == self.expected["state_sha256"]
            and untimed(self.folder / name) == self.expected_rows
        )
        self.report["runs"] += 1
        self.report["mismatches"] += not same
        resumed = re.search(r"resumed from the checkpoint of step \d+", output)
        how = resumed[0] if resumed else "came to its end before it could be killed again"
        self.say(f"{name}: {how}: {'the same' if same else 'ANOTHER'} state")

    def hurt_all(self, kinds, during_save):
        """Hurts runs in all ways, in random order; each resumes the run that was hurt before."""
        wanted = list(kinds)
        self.draw.shuffle(wanted)
        number, alive, attempts = 0, False, 0
        while wanted:
            attempts += 1
            assert attempts <= 10 * len(kinds), "the runs end before they can be hurt: more epochs"
            name, kind = f"run{number}", wanted[-1]
            left = during_save - self.report["sigkill_during_a_save"]
            hurt = self.hurt(name, kind, kind == "sigkill" and left > 0)
            if hurt or hurt is None:
                wanted.pop()
            if hurt:
                self.report["resumes"] += 1  # the next start of this run
                alive = True
            else:
                self.finish(name)
                number, alive = number + 1, False
        if alive:
            self.finish(name)
        for path in self.folder.glob("run*"):
            shutil.rmtree(path)


def decoded_by_workers(folder, workers):
    """Arguments of a run on images that worker processes decode; the digits as PNG files."""
    images, labels = load_digits(return_X_y=True)
    for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / ("test" if index % 5 == 0 else "train") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        picture = (pixels.reshape(8, 8) * 15).astype(np.uint8)
        Image.fromarray(picture).convert("RGB").save(place / f"{index}.png")
    return (
        *("--config.data.name=folder", f"--config.data.dir={folder}", "--config.data.cache_gib=0"),
        f"--config.data.processes={workers}",
    )


def run_chaos(
    folder, *, sigkills, others, during_save, epochs, network, seed, workers=0, say=print
):
    """Both kinds of runs; each gets half of what hurts. Returns the reports.

    ``others``: how often each run is hurt in another way than by SIGKILL, or which ways.
    """
    arguments = (*RUN, f"--config.epochs={epochs}", f"--config.network={network}")
    if workers:
        arguments += decoded_by_workers(folder / "images", workers)
    if isinstance(others, int):  # each kind of run is hurt in each way
        others = [OTHERS[i // 2 % len(OTHERS)] for i in range(others)]
    reports = []
    for count in (1, 2):
        kills, saves = ((n + 2 - count) // 2 for n in (sigkills, during_save))
        draw = random.Random(f"{seed} {count}")
        chaos = Chaos(folder / f"{count}", count, arguments, draw, say)
        chaos.whole()
        chaos.hurt_all([*["sigkill"] * kills, *others[count - 1 :: 2]], saves)
        reports.append(chaos.report | {"seed": seed, "workers": workers})
    return reports


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sigkills", type=int, default=20)
    parser.add_argument("--others", type=int, default=12, help=f"of {', '.join(OTHERS)}, in turn")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--during-save", type=int, default=8, help="of the SIGKILLs")
    parser.add_argument("--epochs", type=float, default=8.0)
    parser.add_argument("--network", default="resnet8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the runs would not hear it

    def say(line):
        print(time.strftime("%H:%M:%S"), line, flush=True)

    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        reports = run_chaos(
            pathlib.Path(folder),
            sigkills=options.sigkills,
            others=options.others,
            workers=options.workers,
            during_save=options.during_save,
            epochs=options.epochs,
            network=options.network,
            seed=options.seed,
            say=say,
        )
    text = json.dumps(reports, indent=2)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")
    sys.exit(any(report["mismatches"] or report["processes_left"] for report in reports))


if __name__ == "__main__":
    main()
