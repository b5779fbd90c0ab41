"""How well the cost model predicts what it has not seen: tables and a picture for docs/cost_model.md.

    python scripts/cost_accuracy.py [--traces DIR] [--plot docs/cost_model.png]

The batches of the paper are part of the package; the links are those of vidur's profiles (data/profiling/network),
looked for in DIR/link_profiles and left out without it. Prints Markdown.
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path

from loong_jax.cost import calibration, fit
from loong_jax.cost.links import fit_link, spread
from loong_jax.cost.measured_a800 import FIGURE_3, NUM_BATCHES, SMALL
from loong_jax.cost.presets import cost_for
from loong_jax.types import ContextForm

LINK_SIZES = 32


def mean_and_max(errors):
    sizes = [abs(error) for error in errors]
    return sum(sizes) / len(sizes), max(sizes)


def left_out_prefill(group):
    """Relative errors of the points of figure 3, each under a roofline fitted without its group."""
    measured = [*FIGURE_3, *SMALL]
    rows, seconds = [calibration.prefill_features(m) for m in measured], [m.prefill_ms / 1e3 for m in measured]
    groups = [group(m) for m in FIGURE_3] + [None] * len(SMALL)
    return fit.leave_out(rows, seconds, groups)[: len(FIGURE_3)]


def left_out_per_configuration():
    """The paper's form, A + B sum(len) + C sum(len^2) for each (sp, tp) by itself: five points predict the sixth."""
    out = {}
    for key in dict.fromkeys((m.sp, m.tp) for m in FIGURE_3):
        points = [m for m in FIGURE_3 if (m.sp, m.tp) == key]
        rows = [[1.0, m.batch * m.length, m.batch * m.length**2] for m in points]
        errors = fit.leave_out(rows, [m.prefill_ms for m in points], [m.length for m in points])
        out.update(zip(points, errors, strict=True))
    return [out[m] for m in FIGURE_3]


def left_out_decode():
    """Relative errors under a model that saw no batch of the shape."""
    out = {}
    for shape in dict.fromkeys((m.batch, m.length) for m in FIGURE_3):
        seen = calibration.fit_efficiency([m for m in FIGURE_3 if (m.batch, m.length) != shape])
        for m in FIGURE_3:
            if (m.batch, m.length) == shape:
                out[m] = calibration.decode_predicted_s(seen, m) * 1e3 / m.decode_ms - 1
    return [out[m] for m in FIGURE_3]


def link_profiles(directory):
    """{name: [(bytes, ms)]} of each profile, in order of size."""
    out = defaultdict(list)
    for path in sorted(directory.glob("network__*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                median = row[f"time_stats.{row['collective']}.median"]
                name = f"{path.stem.removeprefix('network__')} {row['num_workers']}, {row['devices_per_node']} a node"
                out[name].append((int(row["size"]), float(median)))
    return {name: sorted(points) for name, points in out.items()}


def link_errors(points):
    """(median of the sizes that were not fitted, 90th percentile of these)."""
    chosen = set(spread(LINK_SIZES, len(points)))
    model = fit_link([points[i][0] for i in chosen], [points[i][1] for i in chosen])
    errors = sorted(abs(model.seconds(size) / ms - 1) for i, (size, ms) in enumerate(points) if i not in chosen)
    return errors[len(errors) // 2], errors[9 * len(errors) // 10]


def print_points(per_configuration, pooled, configuration, decode):
    columns = "sp x tp | batch x length | prefill ms | (sp, tp) alone | pooled | configuration left out | decode ms"
    print(f"| {columns} | shape left out |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for m, *errors in zip(FIGURE_3, per_configuration, pooled, configuration, decode, strict=True):
        a, b, c, d = (f"{100 * error:+.1f}%" for error in errors)
        shape = f"{m.batch} x {m.length:,}"
        print(f"| {m.sp} x {m.tp} | {shape} | {m.prefill_ms:g} | {a} | {b} | {c} | {m.decode_ms:g} | {d} |")
    sizes = [mean_and_max(errors) for errors in (per_configuration, pooled, configuration, decode)]
    cells = [f"{100 * mean:.2f}% / {100 * top:.1f}%" for mean, top in sizes]
    print(f"| mean / max | | | {cells[0]} | {cells[1]} | {cells[2]} | | {cells[3]} |")


def plot(path, pooled, decode):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2))
    names = [f"{m.sp}x{m.tp}" for m in FIGURE_3]
    for axis, errors, title, bound in (
        (axes[0], pooled, "prefill, each batch left out", 8),
        (axes[1], decode, "decode, each shape left out", 10),
    ):
        for key in dict.fromkeys(names):
            chosen = [i for i, name in enumerate(names) if name == key]
            axis.plot(
                [FIGURE_3[i].length for i in chosen], [100 * errors[i] for i in chosen], "o-", label=f"sp x tp {key}"
            )
        axis.axhspan(-bound, bound, alpha=0.08)
        axis.set(xscale="log", xlabel="length", ylabel="error %", title=title)
        axis.legend()
    cost = cost_for()
    lengths = [int(10 * 1.35**k) for k in range(36)]
    for dop in range(1, 5):
        seconds = [cost.prefill_s(dop, n, n * n / 2, 0, ContextForm.RING) for n in lengths]
        axes[2].plot(lengths, seconds, label=f"DoP {dop}")
    axes[2].set(
        xscale="log", yscale="log", xlabel="length", ylabel="s", title="predicted prefill of one prompt, A800, tp 2"
    )
    axes[2].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, help="folder with link_profiles/")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    args = parser.parse_args()
    per_configuration, decode = left_out_per_configuration(), left_out_decode()
    pooled = left_out_prefill(lambda m: m)
    configuration = left_out_prefill(lambda m: (m.sp, m.tp))
    print(f"Batches behind the calibration: {NUM_BATCHES}\n")
    print_points(per_configuration, pooled, configuration, decode)
    print("\n| efficiency | |\n| --- | --- |")
    efficiency = calibration.a800()
    for field in efficiency.__struct_fields__:
        print(f"| {field} | {getattr(efficiency, field):.4g} |")
    links = link_profiles(args.traces / "link_profiles") if args.traces else {}
    if links:
        print(f"\n| profile (sizes) | median error of sizes left out, from {LINK_SIZES} | 90th percentile |")
        print("| --- | --- | --- |")
    for name, points in links.items():
        median, high = link_errors(points)
        print(f"| {name} ({len(points)}) | {100 * median:.1f}% | {100 * high:.0f}% |")
    if args.plot:
        plot(args.plot, pooled, decode)


if __name__ == "__main__":
    main()
