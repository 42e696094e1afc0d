"""Kills runs at random moments and makes sure that nothing is lost but time.

    python -m tests.chaos.harness --sigkills 20 --sigterms 10 --json results/chaos/report.json

Runs of one process and of two are killed, resumed with the same command, and killed again, until
they end; then their state must be that of a run that was never killed, bit for bit. A run of two
is hurt in one of its processes, chosen at random: the other has to end by itself.
"""

import argparse
import json
import pathlib
import random
import re
import shutil
import signal
import sys
import tempfile
import time

from tests.runs import TINY, Run, logged_step, rows, saved_steps, summary

LOG_EVERY = 3  # so that checkpoints come between two lines of metrics, too
# 23 steps an epoch; a checkpoint every 5 steps, an evaluation every 11
RUN = (
    *TINY,
    *("--config.checkpoint_every=0.2", "--config.eval_every=0.5", "--config.keep_checkpoints=3"),
    f"--config.log_every={LOG_EVERY}",
    # averages are a part of the state, and each evaluation estimates their statistics
    *("--config.optimizer.ema_decay=0.9", "--config.optimizer.ema_batches=2"),
)
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

    def __init__(self, folder, count, epochs, network, draw, say):
        self.folder = folder
        self.count = count
        self.arguments = (*RUN, f"--config.epochs={epochs}", f"--config.network={network}")
        self.draw = draw
        self.say = say
        self.report = {
            "processes": count,
            "sigkills": 0,
            "sigkills_during_a_save": 0,
            "sigterms": 0,
            "resumes": 0,
            "runs": 0,
            "most_steps_lost_by_sigkill": 0,
            "most_steps_lost_by_sigterm": 0,
            "slowest_stop_s": 0.0,
            "mismatches": 0,
        }

    def start(self, name):
        arguments = (*self.arguments, f"--workdir={self.folder / name}")
        return Run(self.folder / f"{name}-output", *arguments, count=self.count)

    def whole(self):
        """The run that nobody kills."""
        with self.start("whole") as run:
            run.succeeds(600)
        self.expected = summary(self.folder / "whole")
        self.expected_rows = untimed(self.folder / "whole")

    def kill_once(self, name, number, during_save):
        """Waits for a random moment after the first checkpoint, and sends the signal.

        Returns whether the run was killed: it may have come to its end before.
        """
        workdir = self.folder / name
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
            victim.send_signal(number)
            began = time.monotonic()
            codes = run.wait(_SECONDS_TO_END)
            seconds = time.monotonic() - began
            # what was half written when it died; by now nobody writes
            cut = saving(workdir)
            kept = saved_steps(workdir)[-1]
            reached = max(logged_step(workdir), kept)
            lost = reached - kept
            if number == signal.SIGTERM:
                if "finished" in run.output() or (workdir / "summary.json").exists():
                    return False
                if any(codes) or "resume with the same command" not in run.output():
                    raise AssertionError(f"SIGTERM: {codes} {run.everything()}")
                self.report["slowest_stop_s"] = max(self.report["slowest_stop_s"], seconds)
            elif not any(codes):
                return False
            else:  # what was done after the last line of metrics, at most
                lost = max(0, logged_step(workdir) + LOG_EVERY - 1 - kept)
        kind = "sigkill" if number == signal.SIGKILL else "sigterm"
        self.report[f"{kind}s"] += 1
        self.report["sigkills_during_a_save"] += number == signal.SIGKILL and cut
        most = f"most_steps_lost_by_{kind}"
        self.report[most] = max(self.report[most], lost)
        self.say(
            f"{self.count} process(es), {name}: {kind} at step {reached} or soon after"
            + (" during a save" if cut else "")
            + f", ended {codes} after {seconds:.1f} s, kept {saved_steps(workdir)}"
        )
        return True

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

    def kill(self, sigkills, sigterms, during_save):
        """The kills, in random order; each resumes the run that the one before killed."""
        wanted = [signal.SIGKILL] * sigkills + [signal.SIGTERM] * sigterms
        self.draw.shuffle(wanted)
        number, alive = 0, False
        while wanted:
            name = f"run{number}"
            left = during_save - self.report["sigkills_during_a_save"]
            if self.kill_once(name, wanted[-1], wanted[-1] == signal.SIGKILL and left > 0):
                wanted.pop()
                self.report["resumes"] += 1  # the next start of this run
                alive = True
            else:
                self.finish(name)
                number, alive = number + 1, False
        if alive:
            self.finish(name)
        for path in self.folder.glob("run*"):
            shutil.rmtree(path)


def run_chaos(folder, *, sigkills, sigterms, during_save, epochs, network, seed, say=print):
    """Both kinds of runs; each gets half of the kills. Returns the reports."""
    reports = []
    for count in (1, 2):
        share = [(n + 2 - count) // 2 for n in (sigkills, sigterms, during_save)]
        draw = random.Random(f"{seed} {count}")
        chaos = Chaos(folder / f"{count}", count, epochs, network, draw, say)
        chaos.whole()
        chaos.kill(*share)
        reports.append(chaos.report)
    return reports


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sigkills", type=int, default=20)
    parser.add_argument("--sigterms", type=int, default=10)
    parser.add_argument("--during-save", type=int, default=8, help="of the SIGKILLs")
    parser.add_argument("--epochs", type=float, default=8.0)
    parser.add_argument("--network", default="resnet8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()

    def say(line):
        print(time.strftime("%H:%M:%S"), line, flush=True)

    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        reports = run_chaos(
            pathlib.Path(folder),
            sigkills=options.sigkills,
            sigterms=options.sigterms,
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
    sys.exit(any(report["mismatches"] for report in reports))


if __name__ == "__main__":
    main()
