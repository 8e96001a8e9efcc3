"""Draw how long PVT-tiny's attention takes with and without spatial reduction, on this machine.

Prints memory too: the most that one forward pass adds to what the process holds.

PYTHONPATH=. python docs/pvt_attention.py    # about a minute on two CPU cores, 1.5 GiB
"""

import math
import statistics

import PIL.Image
import PIL.ImageDraw
import torch

import pvt
import train

BOTTOM, TOP = 280, 40  # rows of 1 ms and of 10 s


@torch.no_grad()
def cost(dim, heads, ratio, side):
    """Milliseconds (median of 5) and MiB of one layer on a map of side x side."""
    layer, cpu = pvt.SpatialReductionAttention(dim, heads, ratio).eval(), torch.device("cpu")
    x = torch.randn(1, side * side, dim)
    seconds = statistics.median(train.timings(cpu, 5, layer, x, (side, side)))
    train.reset_peak_memory(cpu)
    before = train.peak_memory(cpu)
    layer(x, (side, side))
    return 1000 * seconds, 1024 * (train.peak_memory(cpu) - before)


def main():
    picture = PIL.Image.new("RGB", (900, 330), "white")
    pen = PIL.ImageDraw.Draw(picture)
    title = "One attention layer of PVT-tiny, batch 1, ms (log scale): reduced (blue), plain (red)"
    pen.text((10, 8), title, "black")
    for power in range(5):
        y = BOTTOM - power * (BOTTOM - TOP) / 4
        pen.line([50, y, 890, y], "lightgrey")
        pen.text((10, y - 6), str(10**power), "black")
    config = pvt.CONFIGS["tiny"]
    for i, pixels in enumerate((224, 448, 896)):
        left = 70 + 266 * i
        pen.text((left + 80, 305), f"{pixels} x {pixels} px", "black")
        stages = zip(config.embed_dims, config.num_heads, config.sr_ratios, strict=True)
        for s, (dim, heads, ratio) in enumerate(stages):
            pen.text((left + 60 * s + 4, 284), f"stage {s + 1}", "black")
            for j, r in enumerate(dict.fromkeys((ratio, 1))):  # the last stage has no reduction
                ms, mib = cost(dim, heads, r, pixels // (4 * 2**s))
                x, y = left + 60 * s + 26 * j, BOTTOM - max(0, math.log10(ms)) * (BOTTOM - TOP) / 4
                pen.rectangle([x, y, x + 22, BOTTOM], ("royalblue", "firebrick")[r == 1])
                pen.text((x - 2, y - 12), f"{ms:.{int(ms < 10)}f}", "black")
                print(f"{pixels} px, stage {s + 1}, sr_ratio {r}: {ms:.1f} ms, {mib:.1f} MiB")
    picture.save("docs/pvt-attention.png")


if __name__ == "__main__":
    main()
