"""Draw a run's loss as an SVG: `python benchmarks/plot_loss.py RUN_FOLDER OUT.svg`."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
# Text as text and no dates: the file stays small, and the same run draws the same file.
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "torchtitan_lite", "font.size": 11})

import matplotlib.pyplot as plt  # noqa: E402


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main(run: Path, out: Path) -> None:
    """Training loss of each step with its running mean of ten, validation losses as points."""
    # A step logged again after a resume supersedes its earlier line.
    steps = {line["step"]: line["loss"] for line in lines(run / "metrics.jsonl")}
    xs, ys = list(steps), list(steps.values())
    means = [sum(ys[max(0, i - 9) : i + 1]) / len(ys[max(0, i - 9) : i + 1]) for i in range(len(ys))]
    held_out = [(e["step"], e["loss"]) for e in lines(run / "events.jsonl") if e["event"] == "validation"]
    config = json.loads((run / "config.json").read_text())

    figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    axes.plot(xs, ys, color="#9db8d9", linewidth=1, label="training, each step")
    axes.plot(xs, means, color="#1f5fa8", linewidth=2, label="mean of the last ten")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o", color="#c4501b", label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(f"{config['derived']['model']}; {config['derived']['mesh']}", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.set_ylim(bottom=0)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
    print(f"{out}: loss {ys[0]:.2f} to {means[-1]:.2f} in {xs[-1]} steps")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python benchmarks/plot_loss.py RUN_FOLDER OUT.svg")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
