"""From one GPU to a thousand, from four million pairs to a billion: a model of the time, memory and network of a step,
as a Markdown page.

    python benchmarks/scaling.py --data 'photos/train-{000..003}.tar' --output docs/scaling.md

No GPU is needed or used. The page's first table names the source of every input: counted (from the model without data),
measured (now, on this CPU; earlier, on the GPU that `CARD` names) or assumed (an option of this script).
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import torch
from bench_step import SETTINGS
from measure import environment
from memory import fake_problem, standing
from report import table

from softmask_fast.data.augment import AugmentConfig
from softmask_fast.data.loader import PretrainingLoader
from softmask_fast.data.sampler import HashSampler, WindowedSampler
from softmask_fast.data.shards import ShardSource
from softmask_fast.data.sources import open_source
from softmask_fast.data.tokenizer import train_tokenizer
from softmask_fast.model.pretraining import PretrainingStep
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.train import sample_captions
from softmask_fast.training.meters import OperationCounter
from softmask_fast.training.options import make_config
from softmask_fast.utils import write_text

RANKS = (1, 8, 64, 256, 1000)
PAIRS = (4e6, 14e6, 100e6, 1e9)
EPOCHS = 30
PER_SHARD = 10_000
COMMAND = "python benchmarks/scaling.py --data 'photos/train-{000..003}.tar' --output docs/scaling.md"
# The step of base, 128 pairs, bf16, without loader and DeepSpeed: 141.46 ms, of which 124.57 kernels; its operations
# then; and the whole job. docs/decisions.md, "On a GPU"
PAIRS_PER_SECOND, OPERATIONS_A_PAIR, JOB_PAIRS_PER_SECOND = 904.85, 216e9, 370.0
CARD = "one H200, 2026-11-27, commit 107101d, torch 2.11.0+cu130"
EXPLANATION = """\
# From one GPU to a thousand

A model of the `base` preset (the paper's): where time, memory and network go, and what breaks first. **How fast a GPU
runs the step was {source}.
Everything else about GPUs follows from the model and from assumed networks. No run has had more than one GPU.** Made by
`{command}`
(any shards of photographs on a local disk will do) on {machine}, which
measured what it could and counted the rest. Its times are CPU time, which grows where others keep the machine busy.

{inputs}

## A step

{steps}

- *compute*: pairs / the measured pairs per second of a step without loader and DeepSpeed, at 128 pairs. Larger batches
  were faster (1,023 at 256), smaller ones slower. The job around the step was slower
  ([what breaks first](#what-breaks-first)).
- *contrast*: five products (student and teacher, both once more in the backward pass, one gradient) in two directions
  against ranks x pairs + queue keys.
- *gradients* and *weights*: ZeRO 1 reduces 4 bytes a parameter to their owners and gathers as many back. The reduction
  overlaps with the backward pass, so the longer of the two counts. The step waits while weights and features are
  gathered.
- *features*: what the contrast gathers from all ranks, one float32 row each of image and text per pair.
- *ZeRO-3 instead*: weights gathered for the forward pass, for the backward pass and for the teacher,
  parameter by parameter, in place of *weights*.
- *held*: weights, gradients, optimizer, teacher and queues under ZeRO 1; activations come on top
  ([memory.md](memory.md)). Every GPU holds the whole teacher.
- *storage* and *CPU cores*: what the images need at that speed.

## The data

{data}

Every rank keeps the index of shards on a local disk, one entry per sample. For shards by URL it keeps one number per
shard, and their order is drawn shard by shard ([data.md](data.md)).

## What breaks first

1. **The host's launches**, on the first GPU: the only limit here that was met on one. The job around the step
   reached {job:.0f} pairs/s on that card (324 to 332 on an H100), {share:.0%} of the bare step's {step:.0f}, as the
   GPU waited for its host. {big} pairs x {epochs} epochs take {job_time} at that rate, {step_time} at the step's.
   Every time in the table of steps supposes a host that keeps up. Step and job have been rebuilt since, to launch
   less, and have not been measured again ([decisions.md](decisions.md#on-a-gpu)).
2. **Decoding on the host**, on the first GPU. A GPU that trains at the measured speed needs as many CPU cores as the
   last column of the table of steps says. Where there is a GPU, DALI decodes and augments on it.
3. **The index of a local source**, beyond 10 M pairs. It takes hundreds of bytes per sample in every rank, and each
   start spends minutes reading the headers of the shards. Beyond that use shards by URL (`file://` works for a shared
   disk).
4. **The batch**, near 64 GPUs: 128 pairs each are 8,192 together, where the paper has 512. Lower `--batch_size` first.
   The step then has less time to hide its communication in, and its efficiency falls below the table's.
5. **Gathering the weights**, from 8 GPUs on. It is half of ZeRO 1's traffic, and the largest part that nothing hides.
   Stage 0 only reduces gradients, during the backward pass, but needs {replicated:.1f} GiB more on each GPU;
   `--gradient_accumulation_steps` divides the rest.
6. **ZeRO-3** costs more time than its savings in memory are worth at this model size: two collectives for each of
   {tensors} tensors.
7. **The contrast** stays a small part even at 1,000 GPUs. Gathered features need {features:.0f} MB on each GPU there;
   with `--itc_gather ring` a GPU holds one neighbor's rows at a time.
8. **Checkpoints**: {checkpoint:.1f} GB for any number of GPUs. All ranks write them; the first one writes the teacher.

## Several machines

With a `hostfile` (one line `host slots=8` per machine) and ssh between the machines:

```
deepspeed --hostfile hostfile \\
    softmask_fast/train.py --deepspeed ds.json --preset base --data ... --output_dir /shared/run
```

Without ssh, run this once on each machine, with that machine's number:

```
deepspeed --hostfile hostfile --no_ssh --node_rank 0 --master_addr HOST0 --master_port 29500 \\
    softmask_fast/train.py --deepspeed ds.json --preset base --data ... --output_dir /shared/run
```

`--output_dir` must be on a disk that all machines see. A lost rank ends the job: its own launcher stops within seconds,
the others when their connection to it breaks, with a message that says how to resume. With the same number of ranks,
`--resume true` continues to the last bit. With another number it continues from the same step, optimizer state,
teacher, queues and place in the data; `--batch_size` is pairs per rank, so change it as well to keep the batch.
Both are tested: two machines as network namespaces without ssh, a rank killed; 2, then 1, then 2 ranks under ZeRO 0, 1
and 3 (`pytest tests/test_train.py tests/test_zero.py -k "hosts or number_of_ranks"`).
"""


def millions(pairs: float) -> str:
    return f"{pairs / 1e6:,.0f} M"


def duration(seconds: float) -> str:
    """In hours, or in minutes if it is less than one."""
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def operations_per_pair(pairs: int = 32) -> float:
    """Operations of the base preset's step per pair, without the contrastive loss, with the momentum copy."""
    config, model, teacher, batch, mode = fake_problem("base", pairs)
    with mode, OperationCounter() as counter:
        loss, _ = PretrainingStep(model, config.objectives, bf16=True)(batch, teacher, SETTINGS)
        loss.backward()
    return counter.operations / pairs


def contrast_operations(ranks: int, pairs: int, width: int, queue: int) -> float:
    """Operations of a rank's contrastive loss: student and teacher forward, both again in the backward, one
    gradient."""
    return 2 * 5 * 2.0 * pairs * (ranks * pairs + queue) * width


def core_seconds_per_image(data: str, batches: int = 6) -> float:
    """CPU time of reading, checking, decoding and augmenting one image at 256 px as the base preset does."""
    config = make_config("base", data=data)
    source = open_source(data, split="train", seed=0, image_size=256)
    tokenizer = train_tokenizer(sample_captions(source, 500), 4000)
    with PretrainingLoader(
        source,
        tokenizer,
        batch_size=32,
        image_size=256,
        max_tokens=30,
        seed=0,
        augment=AugmentConfig.of(config.data),
    ) as loader:
        next(loader)
        start = time.process_time()
        for _ in range(batches):
            next(loader)
        return (time.process_time() - start) / (32 * batches)


def image_bytes(data: str) -> float:
    source = open_source(data, split="train", seed=0, image_size=256)
    return float(np.mean([len(source.read(i).image) for i in range(0, len(source), max(1, len(source) // 200))]))


def index_of_a_local_source(samples: int = 20_000) -> tuple[float, float]:
    """Bytes and seconds of a sample in the index of shards on a local disk."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part-00000.tar"
        with tarfile.open(path, "w") as shard:
            for i in range(samples):
                for extension, content in (("jpg", b"x"), ("txt", b"a caption")):
                    entry = tarfile.TarInfo(f"{i:09d}.{extension}")
                    entry.size = len(content)
                    shard.addfile(entry, io.BytesIO(content))
        start = time.process_time()
        ShardSource([path])
        seconds = time.process_time() - start
        tracemalloc.start()
        source = ShardSource([path])
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return held / len(source), seconds / samples


def seconds_of_an_order(samples: int = 4_000_000) -> float:
    """Seconds per sample when an epoch begins, with the global permutation of a local source."""
    order = HashSampler([])
    order._hashes = np.random.default_rng(0).integers(0, 2**64, samples, dtype=np.uint64)
    start = time.process_time()
    next(order.indices(0, 1, 0, 8))
    return (time.process_time() - start) / samples


def seconds_of_a_windowed_order(samples: int, ranks: int) -> float:
    """Seconds until the first sample of an epoch is known, with shards by URL."""
    shards = int(samples / PER_SHARD)
    order = WindowedSampler([f"{i:06d}" for i in range(shards)], [PER_SHARD] * shards, 8)
    start = time.process_time()
    next(order.indices(0, 1, 0, ranks))
    return time.process_time() - start


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Scaling by a stated model, as a Markdown page.")
    parser.add_argument("--data", required=True, help="photographs as shards on a local disk, to measure the loader")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.md")
    parser.add_argument("--image_bytes", type=float, default=60e3, help="of a stored photograph, for storage")
    parser.add_argument("--pairs", type=int, default=128, help="of a rank's batch")
    rate_help = f"of a GPU in the step alone; default: {PAIRS_PER_SECOND:g}, as measured on {CARD}"
    parser.add_argument("--pairs_per_second", type=float, default=PAIRS_PER_SECOND, help=rate_help)
    parser.add_argument("--network", type=float, default=50e9, help="bytes/s in and out of each GPU between machines")
    parser.add_argument("--link", type=float, default=300e9, help="bytes/s in and out of each GPU within a machine")
    parser.add_argument("--latency", type=float, default=30e-6, help="seconds that a collective takes at least")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)

    config = make_config("base")
    with torch.device("meta"):
        weights = list(VisionLanguageModel(config.model).parameters())
    parameters = sum(weight.numel() for weight in weights)
    operations = operations_per_pair()
    is_measured = options.pairs_per_second == PAIRS_PER_SECOND
    of_its_step = OPERATIONS_A_PAIR if is_measured else operations
    rate = options.pairs_per_second * of_its_step
    source = f"measured on {CARD}" if is_measured else "assumed, `--pairs_per_second`"
    cores, size = core_seconds_per_image(options.data), options.image_bytes
    index_bytes, index_seconds = index_of_a_local_source()
    order_seconds = seconds_of_an_order()
    width, queue = config.model.embed_dim, config.objectives.queue_size

    inputs = [
        ("parameters", f"{parameters / 1e6:.0f} M", "counted"),
        ("operations a pair, contrast aside", f"{operations / 1e9:.0f} G", "counted (`OperationCounter`)"),
        (
            "CPU time an image (read, check, decode, augment to 256 px)",
            f"{1e3 * cores:.1f} core-ms",
            f"measured (on photographs of {image_bytes(options.data) / 1e3:.0f} kB; larger ones take longer)",
        ),
        ("bytes a stored image", f"{size / 1e3:.0f} kB", "assumed, `--image_bytes`"),
        ("index of a local sample", f"{index_bytes:.0f} bytes, {1e6 * index_seconds:.0f} us", "measured"),
        ("global permutation", f"{1e9 * order_seconds:.0f} ns a sample and epoch", "measured"),
        ("pairs of a rank's batch", str(options.pairs), "`--pairs`"),
        (
            "pairs/s of a GPU in the step",
            f"{options.pairs_per_second:.0f} ({rate / 1e12:.0f} T operations/s, as its step had "
            f"{of_its_step / 1e9:.0f} G a pair)",
            source,
        ),
        ("network of a GPU between machines", f"{options.network / 1e9:.0f} GB/s", "assumed, `--network`"),
        ("network of a GPU within a machine of 8", f"{options.link / 1e9:.0f} GB/s", "assumed, `--link`"),
        ("a collective's shortest time", f"{1e6 * options.latency:.0f} us", "assumed, `--latency`"),
    ]

    steps = []
    for ranks in RANKS:
        bandwidth = options.link if ranks <= 8 else options.network
        far = (ranks - 1) / ranks
        compute = options.pairs / options.pairs_per_second
        contrast = contrast_operations(ranks, options.pairs, width, queue) / rate
        reduced = 4 * parameters * far / bandwidth  # gradients, to their owners
        gathered = 4 * parameters * far / bandwidth  # weights, from their owners
        features = 2 * 4 * ranks * options.pairs * width * far / bandwidth + 3 * options.latency * (ranks > 1)
        zero3 = 3 * 4 * parameters * far / bandwidth + 2 * len(weights) * options.latency * (ranks > 1)
        low = max(compute + contrast, reduced) + gathered + features
        steps.append(
            [
                f"{ranks:,}", f"{ranks * options.pairs:,}", *(f"{1e3 * t:.1f}" for t in (compute, contrast, reduced)),
                f"{1e3 * gathered:.1f}", f"{1e3 * features:.1f}", f"{1e3 * zero3:.0f}",
                f"{ranks * options.pairs / low:,.0f}", f"{compute / low:.0%}",
                duration(PAIRS[0] * EPOCHS / (ranks * options.pairs / low)),
                f"{standing('base', 1, False, ranks) / 2**30:.1f}",
                f"{ranks * options.pairs / low * size / 1e9:.1f}", f"{options.pairs / low * cores:.1f}",
            ]
        )  # fmt: skip
    step_columns = [
        "GPUs", "batch", "compute, ms", "contrast, ms", "gradients, ms", "weights, ms", "features, ms",
        "ZeRO-3 instead, ms", "pairs/s", "efficiency", f"{millions(PAIRS[0])} x {EPOCHS} epochs",
        "held by a GPU, GiB", "storage, GB/s",
        "CPU cores a GPU if it decodes there",
    ]  # fmt: skip

    data = [
        [
            millions(pairs), f"{pairs * size / 1e12:.1f}", f"{pairs * index_bytes / 1e9:,.1f}",
            f"{pairs * index_seconds / 60:,.0f}", f"{pairs * order_seconds:,.1f}",
            f"{24 * pairs / PER_SHARD / 1e6:.1f}", f"{seconds_of_a_windowed_order(int(pairs), 1000):.2f}",
        ]
        for pairs in PAIRS
    ]  # fmt: skip
    data_columns = [
        "pairs", "images, TB", "local: index of a rank, GB", "local: making it, minutes", "local: an epoch's order, s",
        "by URL: index of a rank, MB", "by URL: an epoch's order, s",
    ]  # fmt: skip

    run = environment()
    others = {name: value for name, value in vars(options).items() if value != parser.get_default(name)}
    command = COMMAND + "".join(
        f" --{name} {value:g}" for name, value in others.items() if name not in ("data", "output")
    )
    write_text(
        options.output,
        EXPLANATION.format(
            command=command,
            job=JOB_PAIRS_PER_SECOND,
            step=PAIRS_PER_SECOND,
            share=JOB_PAIRS_PER_SECOND / PAIRS_PER_SECOND,
            big=millions(PAIRS[0]),
            epochs=EPOCHS,
            job_time=duration(PAIRS[0] * EPOCHS / JOB_PAIRS_PER_SECOND),
            step_time=duration(PAIRS[0] * EPOCHS / PAIRS_PER_SECOND),
            source=source,
            machine=f"{run['device']}, {run['threads']} thread{'s' * (run['threads'] > 1)}, torch {run['torch']}",
            inputs=table(["input", "value", "source"], inputs, ":---"),
            steps=table(step_columns, steps),
            data=table(data_columns, data),
            replicated=8 * parameters / 2**30,
            tensors=len(weights),
            features=2 * 4 * RANKS[-1] * options.pairs * width / 1e6,
            checkpoint=20 * parameters / 1e9,
        ),
    )


if __name__ == "__main__":
    main()
