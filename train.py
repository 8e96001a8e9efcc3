"""Train, evaluate, show, measure: one loop for all models.

python train.py --model mimdet                             # generated shapes, on any laptop
python train.py --model mimdet --variant base --data COCO  # real data in COCO's format
torchrun --nproc-per-node=8 train.py --model mimdet ...    # several GPUs
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import itertools
import json
import math
import os
import re
import signal
import statistics
import sys
import time
from pathlib import Path

try:
    import fcntl
    import resource
except ImportError:  # Windows: runs in one folder are the user's care, memory is not measured
    fcntl = resource = None

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import coco
import mimdet
import pvt
import simmim
import yolos
from coco import DataError

MODELS = {"simmim": simmim, "mimdet": mimdet, "yolos": yolos, "pvt": pvt}
EVALUATIONS = 4  # a run
SIZES = (128, 192, 256)  # pixels of the short side, for --benchmark all
SAVE_SECONDS = 600  # last.pt is written at every evaluation and at least this often

# --- 1. Arguments ---------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the list of all options
        self.exit(2, f"error: {message}; --help tells more\n")


def parse_args(argv):
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("--model", choices=MODELS, default="mimdet", help="mimdet by default")
    add("--variant", default="nano", help="a name in the model's CONFIGS")
    about = "any field of the model's Config or recipe: the first screen of its file"
    add("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help=about)
    add("--data", help="folder in COCO format; generated shapes by default")
    add("--out", help="folder of this run; runs/MODEL-VARIANT by default")
    add("--epochs", type=float, help="length of the schedule; the recipe's by default")
    add("--steps", type=int, help="stop here; without --epochs the schedule ends here too")
    add("--batch-size", type=int, help="images a step and process; the recipe's in all by default")
    add("--accumulate", type=int, default=1, help="batches per optimiser step")
    add("--lr", type=float, help="taken literally; the recipe's, scaled to the batch, by default")
    add("--limit", type=int, help="use only the first so many images of each split")
    add("--skip-bad-images", action="store_true", help="go on without them, list them at the end")
    add("--eval-on", choices=["val", "train"], default="val", help="val by default")
    add("--workers", type=int, help="loader processes; as many as help by default")
    add("--device", help="cuda, mps or cpu; the first there is by default")
    add("--amp", choices=["off", "bf16"], help="by default bf16 in training where fast")
    add("--compile", action="store_true", help="torch.compile the blocks, to train")
    add("--seed", type=int, default=0, help="of weights, order and all that is drawn; 0 by default")
    add("--attention", nargs="*", type=int, metavar="TOKEN", help="also where [DET] tokens look")
    add("--init", metavar="FILE", help="start from weights: the authors' or this project's")
    add("--resume", nargs="?", const=True, metavar="FILE", help="go on from last.pt, or FILE")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--eval-only", action="store_true", help="evaluate --init or the run's best.pt")
    about = "draw what --init or best.pt finds on images, or on all of a folder"
    add("--predict", nargs="+", metavar="IMAGE", help=about)
    add("--plot", nargs="+", metavar="RUN", help="draw loss and measure of runs' folders")
    add("--summary", action="store_true", help="print parameters and GFLOPs of every variant")
    about = "print speed and memory; all: of every model, at three sizes"
    add("--benchmark", nargs="?", const="one", choices=["one", "all"], help=about)
    args = parser.parse_args(argv)
    if empty := [name for name, value in vars(args).items() if value == ""]:
        parser.error(f"--{empty[0]} has an empty value: leave it out or give one")
    for name in ("epochs", "steps", "batch_size", "accumulate", "lr", "limit", "workers"):
        value = getattr(args, name)
        if value is not None and not (0 < value < 1e9 or value == 0 and name == "workers"):
            parser.error(f"--{name.replace('_', '-')} {value}: give a number above 0, below 1e9")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed {args.seed}: give 0 or more, below 2**63")
    args.trains = not (args.eval_only or args.predict)  # else it answers, in full precision
    return args


def parse_value(name, text, old):
    if isinstance(old, bool):
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if isinstance(old, int | float):
        return type(old)(text)
    if name == "schedule" and text.isalpha() or (isinstance(old, str) and not text[0].isdigit()):
        return text
    return tuple(float(x) if "." in x or "e-" in x else int(x) for x in text.split(",") if x)


def override(settings, *tables, where="--set"):
    """Apply "field=value" texts to the first table that has the field; values keep their type."""
    for setting in settings:
        name, equals, text = setting.partition("=")
        table = next((t for t in tables if name in t), None)
        if not equals or table is None:
            known = [field for t in tables for field in t]
            near = difflib.get_close_matches(name, known, 1) if equals and where == "--set" else []
            advice = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(known)}"
            raise DataError(f"{where} {setting}: give FIELD=VALUE; {advice}")
        try:
            table[name] = parse_value(name, text, table[name])
        except (ValueError, KeyError, IndexError):
            now = f"{name} is now {table[name]!r}, give a value like it"
            raise DataError(f"{where} {setting}: {now}") from None
        check_numbers({name: table[name]}, where)


def as_settings(table):
    """The texts that --set would need to make this table of simple values."""
    for name, value in table.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else value
        yield f"{name}={text}"


def recipe_of(module, variant, config):
    """The most special of the model's recipes for this variant and its task or head."""
    kinds = [kind for kind in (config.get("task"), config.get("head")) if kind]
    names = [f"{variant}-{kind}" for kind in kinds] + [variant, *kinds, "paper"]
    recipe = next(module.RECIPES[name] for name in names if name in module.RECIPES)
    return recipe | dict(epochs=float(recipe["epochs"]))  # so that --set takes parts of one


def settings(args, path, saved):
    """Config as a dict, and args.recipe: of the saved run or of --variant; changed by --set."""
    module = MODELS[args.model]
    args.variant, args.seed = saved.get("variant", args.variant), saved.get("seed", args.seed)
    if args.variant not in module.CONFIGS:
        raise DataError(f"--variant {args.variant}: {args.model} has {', '.join(module.CONFIGS)}")
    config = dataclasses.asdict(module.CONFIGS[args.variant])
    # As if given by --set: a file has no more rights than a command line.
    override(as_settings(saved.get("config", {})), config, where=f"{path}:")
    override([s for s in args.set if s.partition("=")[0] in config], config)
    args.recipe = recipe_of(module, args.variant, config)
    override(as_settings(saved.get("recipe", {})), args.recipe, where=f"{path}:")
    override(args.set, config, args.recipe)
    if "img_size" in config:
        if any(s.startswith(("sizes=", "max_size=")) for s in args.set):
            say(args, f"sizes and max_size change nothing: {args.model} has one size, img_size")
        args.recipe["sizes"] = (config["img_size"],)
    return config


def check_numbers(table, where="--set"):
    positive = ("lr", "lr_spread", "batch_size", "epochs", "sizes", "max_size", "multiple", "crop")
    for name, value in table.items():
        numbers = value if isinstance(value, tuple) else (value,)
        numbers = [n for n in numbers if isinstance(n, int | float)]
        if any(n < 0 or n == 0 and name in positive for n in numbers):
            raise DataError(f"{where} {name}: {value} is too small")
        most = 1 if name == "drop_path" else 1000 if "depth" in name else 10**6
        if not all(n <= most for n in numbers):
            raise DataError(f"{where} {name}: {value} is too large, or no number")
        whole = isinstance(value, tuple) and name not in ("crop", "schedule", "mlp_ratios")
        if whole and any(isinstance(n, float) for n in numbers):
            raise DataError(f"{where} {name}: {value}: give whole numbers")


def choose_out(args):
    """--out, or runs/MODEL-VARIANT[-N]: the newest one to read from, a free one to write into."""
    if args.out or isinstance(args.resume, str):
        out = Path(args.out or Path(args.resume).parent)
        last = (out / "last.pt").resolve()
        goes_on = args.resume is True or args.resume and Path(args.resume).resolve() == last
        if args.trains and not (args.benchmark or goes_on) and holds_run(out):
            to = "--out: its last.pt would be lost" if args.resume else "--resume, or another --out"
            raise DataError(f"{out} holds a run; give {to}")
        return out
    first = Path(f"runs/{args.model}-{args.variant}")
    if args.resume or not (args.trains or args.init):
        name = re.compile(re.escape(first.name) + r"(-\d+)?")
        saved = [f for f in first.parent.glob("*/last.pt") if name.fullmatch(f.parent.name)]
        return max(saved, key=os.path.getmtime, default=first / "last.pt").parent
    numbered = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
    return next(folder for folder in itertools.chain([first], numbered) if not holds_run(folder))


def holds_run(folder):
    return any((folder / name).exists() for name in ("last.pt", "best.pt", "result.json"))


@contextlib.contextmanager
def claimed(args):
    """Let no second run write into args.out; the claim ends with the process, however it ends."""
    if args.rank or fcntl is None:
        yield
        return
    with (args.out / "lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            advice = "wait for it, or give another --out"
            raise DataError(f"{args.out}: another run is writing here; {advice}") from None
        except OSError:  # a file system without locks
            pass
        try:
            yield
        finally:
            Path(file.name).unlink(missing_ok=True)


def choose_device(name, local_rank):
    if name is None:
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name, local_rank) if name == "cuda" else torch.device(name)
        torch.empty(1, device=device).item()  # "meta" has no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"--device {name}: give cuda, mps or cpu ({reason:.80})") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def bf16_pays(device):
    """bfloat16 is faster on GPUs that compute in it, and on some CPUs."""
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)  # torch 2.6 tells nothing
        return capabilities().get("avx512_bf16", False)
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def keep_freed_memory():
    """Have glibc keep the memory of freed tensors for the next ones: new pages cost time.

    A fifth of PVT-tiny's forward pass on a CPU. The price: the process keeps the most memory it
    ever had. Without glibc (macOS, Windows, musl) nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks too come from the heap, not from mappings
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def settle(args):
    """Fill in what depends on the machine: processes, device, precision, loader workers."""
    args.rank = int(os.environ.get("RANK", 0))
    args.world = int(os.environ.get("WORLD_SIZE", 1))
    args.device = choose_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    if args.device.type == "cpu":
        keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.trains
    args.amp = args.amp or ("bf16" if args.trains and bf16_pays(args.device) else "off")
    if args.workers is None:
        share = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.workers = min(8, share) if args.device.type == "cuda" else 0
    if args.world > 1:
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")


# --- 2. Weights -----------------------------------------------------------------------------------


def read_checkpoint(path):
    """Tensors and plain values of a file; nothing in it is run."""
    try:
        # Some released files hold the authors' arguments: plain values in a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        advice = "train first or give weights with --init FILE"
        raise DataError(f"{path}: no such file; {advice}") from None
    except Exception as error:
        # The first sentence: torch goes on with advice that is not safe to follow.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        why = f"not a checkpoint of plain tensors, or damaged ({reason})"
        raise DataError(f"{path}: {why}") from None
    if not isinstance(data, dict):
        raise DataError(f"{path}: holds a {type(data).__name__}, not a dict of weights")
    return data


@contextlib.contextmanager
def reading(path):
    """What a file of unknown origin breaks is said in one line: the file is wrong, not the code."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        reason = f"{type(e).__name__}: {e}".strip().splitlines()[0]
        raise DataError(f"{path}: damaged, or not made for this model ({reason})") from None


RUN = dict(variant=str, seed=int, classes=list, config=dict, recipe=dict, plan=dict, model=dict)
RUN |= dict(optimizer=dict, step=int, evaluated=int, best=float, seconds=float)
PLAN = dict(about=str, schedule=int, batch_size=int, lr=float)
CLASS = dict(id=int, name=str)


def check_run(path, data):
    """Refuse a file that says it is a run of ours if its parts are not what save_run writes."""
    with reading(path):
        data.setdefault("evaluated", data["step"])  # written before there was this entry
        rows = [(row, CLASS) for row in data["classes"]]
        for part, kinds in [(data, RUN), (data["plan"], PLAN), *rows]:
            for key, kind in kinds.items():
                if not isinstance(part[key], kind):
                    raise TypeError(f"{key} is a {type(part[key]).__name__}")
        whole = 0 <= data["step"] < 10**9 and 0 <= data["seed"] < 2**63
        if not (whole and math.isfinite(data["seconds"]) and 0 < data["plan"]["lr"] < math.inf):
            raise ValueError("its step, seed, seconds or lr is out of range")


def starting_point(args):
    """File to start from or None, its content, and the same if its run goes on; {} for nothing."""
    path, best = args.init, args.out / "best.pt"
    if args.resume:
        path = args.resume = args.out / "last.pt" if args.resume is True else args.resume
    elif not (path or args.trains):
        path = best if best.exists() else args.out / "last.pt"
    data = read_checkpoint(path) if path else {}
    own = data.get("name") == args.model
    if own:
        check_run(path, data)
    elif args.resume:
        other = f"give --model {data['name']}" if "name" in data else "start from it with --init"
        raise DataError(f"{path}: not a run of {args.model}; {other}")
    continues = own and (args.resume or not args.trains)
    return path, data, data if continues else {}


def load_weights(net, args, path, data, exact):
    """Fill net from a checkpoint, ours or the authors', and say what became of every tensor."""
    parts = (data.get(key) for key in ("model", "state_dict"))  # where the authors keep weights
    source = next((part for part in parts if isinstance(part, dict)), data)
    tensors = [(k, v) for k, v in source.items() if isinstance(v, torch.Tensor)]
    source = {k: v for k, v in tensors if isinstance(k, str) and not v.is_nested}
    own, now = data.get("name") == args.model, dataclasses.asdict(net.config)
    for field in ("task", "window", "img_size", "det_tokens", "pos_grid", "mid_pos_grid", "head"):
        own = own and data["config"].get(field) == now.get(field)  # else tables change
    with reading(path):
        state = source if own else MODELS[args.model].from_official(source, net.config)
    wanted = net.state_dict()
    built = {k for k in wanted if k.endswith(("num_batches_tracked", "relative_position_index"))}
    fits = {k: v for k, v in state.items() if k in wanted and v.shape == wanted[k].shape}
    shapes = {v.shape for v in source.values()}
    resized = sum(v.shape not in shapes for v in fits.values())
    lists = {
        "other shape, not loaded": [k for k in state if k in wanted and k not in fits],
        "missing": [k for k in wanted if k not in state and k not in built],
        "unexpected": [k for k in state if k not in wanted],
    }
    if any(isinstance(value, argparse.Namespace) for value in data.values()):
        say(args, f"{path}: its authors' arguments (a Namespace) were let in as plain values")
    told = f"{path}: {len(fits.keys() - built)} of {len(wanted.keys() - built)} tensors loaded"
    told += f", {resized} of them resized"
    say(args, told + (f"; trained for {data['step']!r} steps" if "step" in data else ""))
    for what, names in lists.items():
        if names:
            some = coco.printable(", ".join(names[:4])) + (" ..." if len(names) > 4 else "")
            say(args, f"  {what}: {len(names)}: {some}")
    if sum(v.numel() for v in fits.values()) < 0.1 * sum(v.numel() for v in wanted.values()):
        of, shape = "", ("embed_dim", "embed_dims", "depth", "depths", "num_heads", "patch")
        if "name" in data and isinstance(data.get("config"), dict):
            had = {k: v for k, v in data["config"].items() if k in shape}
            of = f"a run of {data['name']} ({' '.join(as_settings(had))}): "
        name = f"{args.model} {args.variant}"
        raise DataError(f"{path}: {of}almost nothing fits {name}; are --variant and --set right?")
    if exact and fits.keys() | built < wanted.keys():
        raise DataError(f"{path}: does not fit whole; are --set, --variant and --data the same?")
    with reading(path):
        net.load_state_dict(fits, strict=False)
    if bad := not_finite_in(net):
        raise DataError(f"{path}: {len(bad)} of its tensors are not finite, the first is {bad[0]}")


def not_finite_in(net):
    return [name for name, value in net.state_dict().items() if not value.isfinite().all()]


def load_optimizer(optimizer, path, state):
    """Go on with AdamW's averages; rates and decay stay the recipe's, which --set can change."""
    groups = optimizer.state_dict()["param_groups"]
    with reading(path):
        optimizer.load_state_dict(dict(state=state, param_groups=groups))
        for p, averages in optimizer.state.items():
            shapes = [averages[name].shape for name in ("step", "exp_avg", "exp_avg_sq")]
            if shapes != [(), p.shape, p.shape]:
                raise ValueError("the optimizer's state is of other weights")
            for name in ("exp_avg", "exp_avg_sq"):  # with memory of its own, laid out as p's
                averages[name] = torch.empty_like(p).copy_(averages[name])


def write_whole(path, write):
    """Let write(file) make a file so that a crash or full disk leaves the old one or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name without content
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save makes the one into the other
        partial.unlink(missing_ok=True)
        while error.__context__ and not isinstance(error, OSError):
            error = error.__context__
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{path}: cannot be written ({reason}); what was there is kept") from None


def write_json(path, data):
    write_whole(path, lambda file: file.write(json.dumps(data).encode()))


# --- 3. Evaluate ----------------------------------------------------------------------------------


def ignore_interrupt(_):
    """Ctrl-C is for the main process, which finishes its step and saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(args, dataset, sampler, **kwargs):
    kwargs |= dict(num_workers=args.workers, worker_init_fn=ignore_interrupt)
    kwargs |= dict(pin_memory=args.device.type == "cuda", collate_fn=coco.collate)
    return DataLoader(dataset, args.batch_size, sampler=sampler, **kwargs)


def to_device(batch, device):
    """The tensors of a batch on the device; from pinned memory while the CPU goes on."""
    images, targets = batch
    for target in targets:
        tensors = {k: v for k, v in target.items() if isinstance(v, torch.Tensor)}
        target.update({k: v.to(device, non_blocking=True) for k, v in tensors.items()})
    return [image.to(device, non_blocking=True) for image in images], targets


def autocast(args):
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp == "bf16")


@torch.inference_mode()
def evaluate(args, net, dataset, tag):
    """Metrics over the whole data set; writes detections and a picture into args.out."""
    net.eval()
    if args.world > 1:  # without SyncBatchNorm each has means of its own; rank 0's are saved
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)
    results, drawn, began = [], {}, time.time()
    shapes = [(image["width"], image["height"]) for image in dataset.images]
    order = sorted(range(len(dataset)), key=shapes.__getitem__)  # equal sizes share a batch
    place = {dataset.images[i]["id"]: n for n, i in enumerate(order)}
    mine = order[args.rank :: args.world]
    shown = sorted(mine)[:8]
    for batch in make_loader(args, dataset, mine):
        images, targets = to_device(batch, args.device)
        sizes, ids = [t["size"] for t in targets], [f"image {t['image_id']}" for t in targets]
        outputs = answers(args, net, images, sizes, ids)
        for target, output in zip(targets, outputs, strict=True):
            if "skipped" in target:  # another image stood in: it has no answer
                args.skipped.update(target["skipped"])
                continue
            results += coco.to_results(dataset, target, output)
            if (index := order[place[target["image_id"]]]) in shown:
                drawn[index] = output
    # In the order of one process.
    results = sorted(gather(args, results), key=lambda result: place[result["image_id"]])
    if args.rank:
        return None
    metrics = coco.evaluate(dataset, results)
    if dataset.task == "detect":
        write_json(detections_file(args), results)
    if drawn:
        coco.save_pictures(args.out / f"{tag}.png", comparison(dataset, drawn))
    overall = {k: v for k, v in metrics.items() if not k.endswith(coco.METRICS[3:])}
    line = "  ".join(f"{k} {n_a(v)}" for k, v in overall.items())
    print(f"{tag}  {line}  ({len(dataset)} images, {duration(time.time() - began)})", flush=True)
    return metrics


def answers(args, net, images, sizes, names):
    """What the model finds on images, which is refused where it is not finite."""
    with autocast(args):
        outputs = net(images, sizes=sizes)
    for name, output in zip(names, outputs, strict=True):
        for key in {"boxes", "scores", "logits", "reconstruction"} & output.keys():
            if not output[key].isfinite().all():
                advice = "take other weights, or train at a lower --lr"
                raise DataError(f"{name}: the model's {key} are not finite; {advice}")
    return outputs


def gather(args, items):
    """The lists of all processes as one."""
    shards = [items] * args.world
    if args.world > 1:
        dist.all_gather_object(shards, items)
    return sum(shards, [])


def detections_file(args):
    """Where detections go: not over those of a run that is judged once more."""
    again = args.eval_only and holds_run(args.out)
    return args.out / ("eval-only-detections.json" if again else "detections.json")


def comparison(dataset, outputs):
    """Picture rows of two images each, at their own size: truth beside what was found."""
    pairs = []
    for index in sorted(outputs):
        if dataset.task == "pretrain":
            pairs.append(reconstruction(dataset[index][0], outputs[index]))
        else:
            image, truth = coco.finish(*dataset.read(index))
            pairs.append([coco.draw(image, x, dataset.classes) for x in (truth, outputs[index])])
    return [sum(pairs[i : i + 2], []) for i in range(0, len(pairs), 2)]


def reconstruction(image, found):
    """Image, the same masked, and what the model made of it."""
    return [coco.draw(x, {}, []) for x in (image, found["masked"], found["reconstruction"])]


def n_a(value):
    return "n/a" if value == -1 else f"{value:.3f}"


def duration(seconds):
    m, s = divmod(round(seconds), 60)
    return f"{m // 60}h{m % 60:02}m" if m >= 60 else f"{m}m{s:02}s"


# --- 4. Train -------------------------------------------------------------------------------------


def lr_factor(step, steps, recipe):
    """Linear warm-up, then a cosine to 0, (1 - x)^0.9, or x 0.1 at each of the schedule's parts."""
    warmup = min(recipe["warmup"], steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    if recipe["schedule"] == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))
    if recipe["schedule"] == "poly":
        return (1 - (step - warmup) / (steps - warmup)) ** 0.9
    return 0.1 ** sum(step >= part * steps for part in recipe["schedule"])


def plan(args, dataset, saved):
    """Set args.steps (where to stop), total_steps (of the schedule), total_batch, lr and plan.

    saved: the run that --resume goes on with, whose plan has to be the same, or {}.
    """
    recipe, was = args.recipe, saved.get("plan", {})
    args.total_batch = total = args.batch_size * args.accumulate * args.world
    args.per_epoch = coco.steps_per_epoch(dataset, total)
    args.total_steps = was.get("schedule", args.steps)
    if args.epochs or not args.total_steps:
        args.total_steps = max(1, round((args.epochs or recipe["epochs"]) * args.per_epoch))
    args.steps = min(args.steps or args.total_steps, args.total_steps)
    if isinstance(recipe["schedule"], str) and recipe["schedule"] not in ("cosine", "poly"):
        known = "cosine, poly, or parts like 0.75,0.9"
        raise DataError(f"--set schedule={recipe['schedule']}: give {known}")
    names = ", ".join(c["name"] for c in dataset.classes)
    about = f"{args.total_steps} steps of {total} of {len(dataset)} images of {names:.80}"
    for name in ("lr", "batch_size", "epochs"):
        if recipe[name] != (kept := saved.get("recipe", recipe).get(name, recipe[name])):
            raise DataError(f"--set {name}: a resumed run keeps {kept}")
    if was and was["about"] != about:
        same = "--data, --limit, --epochs and --batch-size x --accumulate x processes"
        told = f"{args.resume}: a run of {was['about']}; this is one of {about}"
        raise DataError(f"{told}; give the same {same}, or go on with --init")
    how = f"{recipe['lr']:g} x {total}/{recipe['batch_size']} images"
    how = "as given" if args.lr else "as before" if was else how
    args.lr = args.lr or was.get("lr") or recipe["lr"] * total / recipe["batch_size"]
    args.plan = dict(about=about, schedule=args.total_steps, batch_size=total, lr=args.lr)
    length = f"{args.steps} steps of {total} images, {args.steps / args.per_epoch:.3g} epochs"
    say(args, f"{length}; lr {args.lr:.3g} ({how})")


def check_finite(step, norm, parts, grads):
    """parts: losses and image ids of each batch of a step; grads: of each parameter, by name."""
    if (norm + sum(sum(losses.values()) for losses, _ in parts)).isfinite():
        return  # a GPU is waited for once a step; what follows looks for the cause
    for losses, ids in parts:
        if bad := [name for name, loss in losses.items() if not loss.isfinite()]:
            images = ", ".join(map(str, ids))
            raise not_finite(step, f"{', '.join(bad)} is not finite on images {images}")
    bad = [name.removeprefix("module.") for name, g in grads.items() if not g.isfinite().all()]
    whose = ", ".join(bad[:3]) or "all parameters together"
    seen = " (another process may name the images)" if dist.is_initialized() else ""
    raise not_finite(step, f"the gradient of {whose} is not finite{seen}")


def not_finite(step, what):
    advice = "Try a lower --lr, --amp off, or look at the images"
    return DataError(f"step {step}: {what}; what was saved is kept. {advice}")


def train_step(args, model, optimizer, batches, step):
    """One update from --accumulate batches; returns the mean of their losses."""
    torch.manual_seed(coco.random_seed(args.seed, step, args.rank))  # a resumed run draws the same
    for group in optimizer.param_groups:
        group["lr"] = args.lr * lr_factor(step, args.total_steps, args.recipe) * group["lr_scale"]
    model.train()
    parts = []
    for part in range(args.accumulate):
        images, targets = to_device(next(batches), args.device)
        args.skipped.update(*(target.pop("skipped", ()) for target in targets))
        last = part == args.accumulate - 1
        with contextlib.nullcontext() if last or args.world == 1 else model.no_sync():
            with autocast(args):
                losses = model(images, targets)
            (sum(losses.values()) / args.accumulate).backward()
        ids = [target["image_id"] for target in targets]
        parts.append(({name: loss.detach() for name, loss in losses.items()}, ids))
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(grads.values())
    check_finite(step + 1, norm, parts, grads)
    if args.recipe["clip"]:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), args.recipe["clip"], norm)
    optimizer.step()
    optimizer.zero_grad()
    return {name: sum(part[name] for part, _ in parts) / args.accumulate for name in losses}


def compile_blocks(net):
    """Compile transformer blocks and convolutional stems, in place.

    Not the whole model: what follows a detector's encoder changes with every image. Where all
    images are squares of one size, stages of different sizes get graphs of their own: one for all
    takes longer to make, for Swin many minutes. Raises DataError for Swin before torch 2.14.
    """
    task = getattr(net.config, "task", "detect")
    dynamic = False if task in ("classify", "pretrain") else None
    # Blocks differ in width, in drop_path, and whether they learn.
    torch._dynamo.config.cache_size_limit = 256
    # Else the graph of a block is cut for DistributedDataParallel, and fails on drop_path.
    torch._dynamo.config.optimize_ddp = False
    for module in net.modules():
        kind = type(module).__name__
        if kind.startswith("Swin") and torch.__version__ < "2.14":
            raise DataError("--compile: Swin needs torch 2.14 for it; leave it out")
        if re.search("Block|ConvStem", kind):
            module.compile(dynamic=dynamic)


def start(args, net, saved, dataset):
    """Model to train, optimizer, batches, and the step and best score so far."""
    plan(args, dataset, saved)
    if getattr(net, "wants_pictures", False):
        net.prepare([dataset[i, i][0] for i in range(min(256, len(dataset)))])
    groups = MODELS[args.model].param_groups(net, args.recipe)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    args.began, args.evaluated = time.time() - saved.get("seconds", 0), saved.get("evaluated", 0)
    step, best = saved.get("step", 0), saved.get("best", -math.inf)
    if saved:
        load_optimizer(optimizer, args.resume, saved["optimizer"].get("state"))
        say(args, f"resuming after step {step}")
        if step >= args.steps:
            how = "with --init and another --out" if step >= args.total_steps else "by more --steps"
            say(args, f"nothing is left to train; go on {how}")
    if args.compile:
        compile_blocks(net)
    model = torch.nn.parallel.DistributedDataParallel(net) if args.world > 1 else net
    share = args.batch_size * args.accumulate  # of this process in a step
    order = coco.batches(dataset, share, step, args.steps, args.seed, args.rank, args.world)
    batches = iter(make_loader(args, dataset, itertools.chain.from_iterable(order)))
    return model, optimizer, batches, step, best


def listen(args):
    """A list that is filled by the first Ctrl-C; the second ends the process at once."""
    interrupted = []

    def interrupt(*_):
        if interrupted:
            sys.exit(130)
        interrupted.append(True)
        if args.rank == 0:  # print may not be entered twice
            os.write(2, b"\nsaving after this step or evaluation; Ctrl-C again leaves at once\n")

    signal.signal(signal.SIGINT, interrupt)
    return interrupted


def train(args, net, saved, dataset, held_out):
    """Train to args.steps; returns the last evaluation's metrics."""
    model, optimizer, batches, first, best = start(args, net, saved, dataset)
    eval_every = math.ceil(args.total_steps / EVALUATIONS)
    log_every = max(1, min(50, eval_every // 4))
    missed = args.evaluated < first and first % eval_every == 0  # the run ended before or in it
    again = missed or first >= args.steps
    args.evaluated = min(args.evaluated, first - again)  # what is judged again is logged once
    trim_log(args, first)
    interrupted, metrics = listen(args), None
    if again:
        metrics, best = judge(args, net, optimizer, held_out, first, best)
    shown, clock, written = first, time.time(), time.time()
    for step in range(first, args.steps):
        losses = train_step(args, model, optimizer, batches, step)
        done = step + 1
        if done % log_every == 0 or done == args.steps:
            speed = (done - shown) * args.total_batch / (time.time() - clock)
            log_step(args, done, losses, speed)
            shown, clock = done, time.time()
        stops = on_any_rank(args, bool(interrupted))
        evaluates = (done % eval_every == 0 or done == args.steps) and not stops
        if evaluates or stops or time.time() - written > SAVE_SECONDS:
            save_run(args, net, optimizer, done, best)
            written = time.time()
        if stops:
            leave(args, done)
        if evaluates:
            metrics, best = judge(args, net, optimizer, held_out, done, best)
            save_run(args, net, optimizer, done, best)
            shown, clock = done, time.time()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return metrics


def trim_log(args, step):
    """Leave in log.jsonl what was saved up to this step: the rest is done, and said, again."""
    if args.rank:
        return
    path, kept = args.out / "log.jsonl", []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a full disk leaves half a line
            about = json.loads(line)
            if about["step"] <= (step if "lr" in about else args.evaluated):
                kept.append(line + b"\n")
    write_whole(path, lambda file: file.write(b"".join(kept)))


def leave(args, step):
    list_skipped(args)  # waits for all: whoever leaves first ends those who write
    last = args.out / "last.pt"
    say(args, f"interrupted after step {step}; the same command goes on with --resume {last}")
    end_processes()  # threads of the group may abort a process that just leaves
    sys.exit(130)


def end_processes():
    """End the group of processes, if there is one."""
    if dist.is_initialized():
        time.sleep(0.1)  # or torch 2.6 waits for ever for its thread that drops what was gathered
        dist.destroy_process_group()


def list_skipped(args):
    """What was wrong with the images that --skip-bad-images left out."""
    if skipped := sorted({*gather(args, [*args.skipped])}):
        missed = "in AP their objects count as missed, other measures leave them out"
        about = f"{len(skipped)} bad images skipped ({missed}):"
        say(args, "\n  ".join([about, *skipped]))


def judge(args, net, optimizer, held_out, step, best):
    """Evaluate; log it, write result.json, and best.pt if no first metric was better."""
    metrics = evaluate(args, net, held_out, f"epoch-{step / args.per_epoch:06.2f}")
    args.evaluated = step
    if args.rank:
        return metrics, best
    log_line(args, step=step, epoch=step / args.per_epoch, **metrics)
    run = dict(seed=args.seed, config=dataclasses.asdict(net.config), command=" ".join(sys.argv))
    run |= dict(images_seen=step * args.total_batch, steps=step, seconds=time.time() - args.began)
    write_json(args.out / "result.json", metrics | run)
    if (score := next(iter(metrics.values()))) >= best:  # of equal ones the last
        best = score
        save_run(args, net, optimizer, step, best, "best.pt")
    return metrics, best


def save_run(args, net, optimizer, step, best, name="last.pt"):
    """Everything needed to go on, to predict, or to start another model from."""
    if bad := not_finite_in(net):
        raise not_finite(step, f"{', '.join(bad[:3])} of the model is not finite")
    if args.rank:
        return
    data = dict(name=args.model, variant=args.variant, seed=args.seed, classes=args.classes)
    data |= dict(model=net.state_dict(), optimizer=optimizer.state_dict(), step=step, best=best)
    data |= dict(config=dataclasses.asdict(net.config), recipe=args.recipe, plan=args.plan)
    # evaluated: the step after which the last evaluation was
    data |= dict(seconds=time.time() - args.began, evaluated=args.evaluated)
    write_whole(args.out / name, lambda file: torch.save(data, file))


def on_any_rank(args, flag):
    """True on every process if it is on one, so that all of them stop after the same step."""
    if args.world == 1:
        return flag
    return summed(args, torch.tensor(int(flag), device=args.device)).item() > 0


def summed(args, tensor):
    """The sum over all processes."""
    if args.world > 1:
        dist.all_reduce(tensor)
    return tensor


def log_step(args, step, losses, speed):
    """A line of progress on the screen and in log.jsonl; losses are means over the processes."""
    values = summed(args, torch.stack(list(losses.values()))) / args.world
    if args.rank:
        return
    values = {name: round(value, 6) for name, value in zip(losses, values.tolist(), strict=True)}
    epoch, lr = step / args.per_epoch, args.lr * lr_factor(step - 1, args.total_steps, args.recipe)
    left = (args.steps - step) * (time.time() - args.began) / step
    parts = "  ".join(f"{k.removeprefix('loss_')} {v:.3f}" for k, v in values.items())
    about = f"step {step}/{args.steps}  epoch {epoch:.2f}  loss {sum(values.values()):.3f}"
    say(args, f"{about}  {parts}  lr {lr:.1e}  {speed:.1f} images/s  {duration(left)} left")
    log_line(args, step=step, epoch=epoch, lr=lr, images_per_second=round(speed, 2), **values)


def log_line(args, **line):
    with (args.out / "log.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def say(args, text):
    if args.rank == 0:
        print(text, flush=True)


# --- 5. Predict, summary, benchmark ---------------------------------------------------------------


@torch.inference_mode()
def predict(args, net):
    """Draw what is found on pictures and save each into args.out."""
    if args.rank:
        return
    net.eval()
    count = getattr(net.config, "det_tokens", 0)  # of another model: 0
    if args.attention is not None and not (count and all(0 <= t < count for t in args.attention)):
        have = f"tokens 0 to {count - 1}" if count else "no [DET] tokens: give --model yolos"
        raise DataError(f"--attention: {args.model} has {have}")
    transform = coco.Transform(args.recipe, False, getattr(net.config, "task", "detect"))
    given = [coco.find_images(path) if os.path.isdir(path) else [path] for path in args.predict]
    if not all(given):
        raise DataError(f"--predict {args.predict[given.index([])]}: a folder without images")
    for number, path in enumerate(sum(given, []), start=1):
        try:
            pixels = coco.read_image(path)
        except DataError as error:
            if not args.skip_bad_images:
                raise
            print(error)
            continue
        image, _ = coco.finish(*transform(pixels, {}))
        image, pixels = image.to(args.device), pixels / 255
        (found,) = answers(args, net, [image], [tuple(pixels.shape[-2:])], [path])
        if "reconstruction" in found:
            drawn = reconstruction(image, found)
        else:
            drawn = [coco.draw(pixels, found, args.classes)]
        file = args.out / f"predict-{number}-{Path(path).stem}.png"
        coco.save_pictures(file, [drawn])
        print(coco.printable(f"{path}: {coco.describe(found, args.classes)} -> {file}"))
        if args.attention is not None:
            maps, order = net.attention(image), found["tokens"].tolist()  # (Q, h, H/16, W/16)
            sure = int((found["scores"] >= 0.5).sum())
            tokens = args.attention or order[: min(4, max(1, sure))]
            lit = [(found["boxes"][order.index(token)], maps[token]) for token in tokens]
            file = file.with_stem(file.stem + "-attention")
            coco.save_pictures(file, [coco.draw_attention(pixels, *pair) for pair in lit])
            print(f"  [DET] tokens {', '.join(map(str, tokens))}: box and one map a head -> {file}")


def show_tokens(args, dataset):
    """What each [DET] token finds over a data set: a picture, and what the token tells of a box."""
    results = json.loads(detections_file(args).read_text())
    results = [result for result in results if result["score"] >= 0.5]
    if not results:
        return print("no detection has a score of 0.5: nothing to say of the [DET] tokens")
    coco.draw_tokens(args.out / "tokens.png", dataset, results)
    tokens = torch.tensor([r["token"] for r in results])
    labels = torch.tensor([dataset.label_of[r["category_id"]] for r in results])
    told = MODELS[args.model].specialisation(tokens, coco.relative_boxes(dataset, results), labels)
    parts = (f"{what} {share:.2f} (by chance {luck:.2f})" for what, (share, luck) in told.items())
    print(f"of a box's place, size and category its [DET] token tells: {', '.join(parts)}")


def plot(args):
    """Draw the curves of runs, from their logs, into one picture."""
    runs, path = {}, Path(args.out or args.plot[0]) / "curves.png"
    for folder in map(Path, args.plot):
        try:
            lines = (folder / "log.jsonl").read_text().splitlines()
            runs[str(folder)] = [json.loads(line) for line in lines]
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{folder}: no log of a run ({error}); give folders of runs") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    with reading(", ".join(runs)):
        coco.draw_curves(path, runs)
    print(f"{', '.join(runs)} -> {path}")


def summary():
    """Parameters and cost of every variant of every model, without allocating any."""
    print("model    variant       parameters     trainable     input    GFLOPs")
    for name, module in MODELS.items():
        for variant, config in module.CONFIGS.items():
            recipe = recipe_of(module, variant, dataclasses.asdict(config))
            size, sizes = (128, 128), recipe["sizes"]
            if hasattr(config, "img_size"):
                size = (config.img_size, config.img_size)
            elif sizes:  # the largest picture of an evaluation
                longest = recipe["max_size"] * sizes[-1] // max(sizes)
                size = (sizes[-1], longest // recipe["multiple"] * recipe["multiple"])
            with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
                net = module.build(config, 80).eval()
                net.every_layer([torch.rand(3, *size)])
            total = sum(p.numel() for p in net.parameters())
            trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
            flops = counter.get_total_flops() / 1e9
            row = f"{name:8} {variant:10} {total:13,} {trainable:13,}"
            print(f"{row} {size[0]:4}x{size[1]:<4} {flops:9,.1f}")
    print("80 classes; one image; a multiplication and its addition count as two operations")


def benchmark(args):
    """Speed, memory and share of the machine's peak, of one model or of all at three sizes.

    A table, and the same as a line of json. The peak is that of a matrix product, the best of 8.
    On real images, because matching, suppression and pasting take as long as there is to find.
    """
    size = 2048 if args.device.type == "cpu" else 8192
    dtype = torch.bfloat16 if args.amp == "bf16" else torch.float32
    a = torch.randn(size, size, device=args.device, dtype=dtype)
    peak = 2 * size**3 / min(timings(args.device, 8, torch.matmul, a, a))
    jobs = itertools.product(MODELS, SIZES) if args.benchmark == "all" else [(args.model, None)]
    spawn, rows = torch.multiprocessing.get_context("spawn"), []
    for job in jobs:  # each in a process of its own: its memory is not what another has left behind
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
            rows += pool.submit(measure, args, peak, *job).result()
    threads = f"{torch.get_num_threads()} threads, " if args.device.type == "cpu" else ""
    print(f"\n{args.device}, {threads}amp {args.amp}; matrix product {peak / 1e9:,.0f} GFLOP/s")
    print("model    variant    images         work           ms  images/s    GFLOP  of peak    GiB")
    for r in rows:
        images = f"{r['batch']} x {r['height']}x{r['width']}"
        row = f"{r['model']:8} {r['variant']:10} {images:14} {r['work']:8} {r['ms']:8.1f}"
        row += f" {r['images_per_second']:9.1f} "
        if r["work"] == "load":
            print(f"{row} one process; {r['waits']:.1%} of training is waiting for images")
        else:
            print(f"{row}{r['gflop']:8,.1f} {r['of_peak']:8.1%} {r['gib']:6.2f}")
    about = dict(device=str(args.device), amp=args.amp, peak_gflops=peak / 1e9)
    print(json.dumps(about | dict(rows=rows)))


def measure(args, peak, name, size):
    """Rows of the table: answering and training on one batch, and loading such batches."""
    args.model, repeats = name, args.steps or 5
    args.steps, args.epochs, args.accumulate = repeats + 2, None, 1
    if size and hasattr(MODELS[name].Config, "img_size"):
        args.set += [f"img_size={size}"]
    elif size:
        args.set += [f"sizes={size}", f"max_size={5 * size // 3}"]
    settle(args)
    workers, args.workers = args.workers, 0
    net, _, dataset, _ = prepare(args)
    model, optimizer, batches, *_ = start(args, net, {}, dataset)
    images, targets = to_device(next(batches), args.device)

    def forward(model, images, _):
        model.eval()
        with torch.no_grad(), autocast(args):
            model(images)

    def step(model, *batch):
        train_step(args, model, optimizer, itertools.repeat(batch), 0)

    rows = []
    for work in (forward, step):
        # In plain formulas: the counter does not know every fused or compiled kernel. In pairs:
        # all attention written out at once may not fit, one image may be too few for BatchNorm.
        # So padding counts as far as a pair has it.
        eager = torch.compiler.set_stance("force_eager")
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), eager:
            for i in range(parts := max(1, len(images) // 2)):
                work(net, images[i::parts], targets[i::parts])
        flops = counter.get_total_flops()
        reset_peak_memory(args.device)
        times = timings(args.device, repeats, work, model, images, targets)
        seconds = statistics.median(times)
        row = dict(work=work.__name__, ms=1000 * seconds, gib=peak_memory(args.device))
        rows.append(row | dict(gflop=flops / 1e9, of_peak=flops / seconds / peak))
    loading = statistics.median(timings(args.device, repeats, next, batches))
    wait = max(0, loading / workers - seconds) if workers else loading
    rows.append(dict(work="load", ms=1000 * loading, waits=wait / (wait + seconds)))
    height, width = images[0].shape[1:]
    about = dict(model=name, variant=args.variant, batch=len(images), height=height, width=width)
    return [about | row | dict(images_per_second=1000 * len(images) / row["ms"]) for row in rows]


def timings(device, repeats, work, *inputs):
    """Seconds of each repeat of work(*inputs), after a first one that warms up."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work(*inputs)
        getattr(torch, device.type).synchronize()
        times.append(time.perf_counter() - began)
    return times[1:]


def reset_peak_memory(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc: give back what is free
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # Linux; elsewhere the peak is that of the whole run
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """Most memory used, in GiB: of the GPU, or of this process; nan where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# --- 6. Main --------------------------------------------------------------------------------------


def run(args):
    if args.summary or args.plot:
        return plot(args) if args.plot else summary()
    settle(args)
    if args.attention is not None and not args.predict:
        raise DataError("--attention goes with --predict IMAGE")
    if args.benchmark and args.world > 1:
        raise DataError("--benchmark measures one process: start it without torchrun")
    if args.benchmark:
        return benchmark(args)
    net, saved, dataset, held_out = prepare(args)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.predict:
        return predict(args, net)
    if args.eval_only:
        metrics = evaluate(args, net, held_out, "eval-only")
        if hasattr(MODELS[args.model], "specialisation") and args.rank == 0:
            show_tokens(args, held_out)
    else:
        with claimed(args):
            metrics = train(args, net, saved, dataset, held_out)
    report(args, metrics)


def prepare(args):
    """What the arguments ask for: model, the run to go on with or {}, and both data sets."""
    args.out, args.skipped = choose_out(args), set()
    path, data, saved = starting_point(args)
    config = settings(args, path, saved)
    total = saved.get("plan", args.recipe)["batch_size"]
    args.batch_size = args.batch_size or max(1, total // args.world // args.accumulate)
    args.classes = saved.get("classes") or coco.CLASSES
    dataset, held_out = None, None
    if not args.predict or args.data and not saved:  # foreign weights: for the classes' names
        dataset, held_out = read_data(args, config, saved.get("classes"))
        args.classes = held_out.classes
    net = make_net(args, config, len(args.classes))
    if path:
        load_weights(net, args, path, data, exact=saved or args.predict)
    return net, saved, dataset, held_out


def read_data(args, config, classes):
    """Training split (None if nothing is trained) and the split to evaluate on."""
    root, dataset = args.data or "data/shapes", None
    if not args.data and args.rank == 0:
        coco.make_shapes(root)
    if args.world > 1:
        dist.barrier()
    task = getattr(MODELS[args.model].Config(**config), "task", "detect")
    if task not in coco.DATASETS:
        raise DataError(f"--set task={task}: give pretrain or classify")
    if args.trains:
        transform = coco.Transform(args.recipe, True, task)
        dataset = coco.DATASETS[task](root, "train", transform, args.limit, classes)
        if not dataset.same_classes:
            advice = "give the same --data, or start from its weights with --init"
            raise DataError(f"{dataset.file}: other categories than those of the run; {advice}")
        classes = dataset.classes
        say(args, f"train: {'; '.join(dataset.notes)}")
    transform = coco.Transform(args.recipe, False, task)
    held_out = coco.DATASETS[task](root, args.eval_on, transform, args.limit, classes)
    say(args, f"evaluation on {args.eval_on}: {'; '.join(held_out.notes)}")
    if config.get("masks") and not (dataset or held_out).has_masks:
        config["masks"] = False
        say(args, "no masks in the annotations: boxes alone")
    for split in filter(None, (dataset, held_out)):
        split.skip_bad = args.skip_bad_images
        split.has_masks &= config.get("masks", False)  # else nobody reads them
    return dataset, held_out


def make_net(args, config, num_classes):
    module = MODELS[args.model]
    torch.manual_seed(args.seed)
    try:
        net = module.build(module.Config(**config), num_classes)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        if explain(error):
            raise
        given = " ".join(["--set", *args.set])
        raise DataError(f"{given}: no such model: {str(error).splitlines()[0]}") from None
    if args.device.type == "cuda" and args.world > 1:
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    return net.to(args.device, memory_format=torch.channels_last)


def report(args, metrics):
    """The closing table, what was left out, and what lies in the run's folder."""
    list_skipped(args)
    if not metrics:
        return
    if "AP" in metrics:
        print("\n        " + "".join(f"{name:>8}" for name in coco.METRICS))
        for kind, prefix in (("boxes", ""), ("masks", "mask_")):
            row = [n_a(metrics.get(prefix + name, -1.0)) for name in coco.METRICS]
            print(f"{kind:8}" + "".join(f"{value:>8}" for value in row))
    else:
        print("\n" + "  ".join(f"{name} {n_a(value)}" for name, value in metrics.items()))
    print(f"\nin {args.out}: " + "  ".join(sorted(path.name for path in args.out.iterdir())))


HINTS = {  # what torch says -> what to do
    "out of memory|DefaultCPUAllocator": "not enough memory; give a smaller --batch-size (with "
    "--accumulate), --set max_size=... or sizes=... (SimMIM: img_size=...), or "
    "--set checkpoint=true",
    "more than 1 value per channel": "one picture this small is too little for BatchNorm; give a "
    "larger --batch-size or --set sizes=...",
    r"DataLoader worker \(pid": "a loader process was ended, often for its memory; give fewer "
    "--workers",
    "CxxCompiler|Compiler: .* not found|find C compiler": "--compile needs a C++ compiler; install "
    "one or leave it out",
    "terminated abruptly": "the measuring process was ended, often for its memory; give a smaller "
    "--batch-size",
    "closed by peer": "another process ended; what it says counts",
    "environment variable .* expected": "several processes are started by torchrun; else unset "
    "WORLD_SIZE",
}


def explain(error):
    """One line for what the user can mend; None for a bug, whose traceback is wanted."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{error}: make room, then start again, a run with --resume"
    if isinstance(error, DataError | OSError):  # a loader process puts its traceback first
        return lines[-1].rpartition("coco.DataError: ")[2]
    said = "out of memory" if isinstance(error, MemoryError) else lines[0]
    hints = (f"{hint} ({lines[0]})" for text, hint in HINTS.items() if re.search(text, said))
    return next(hints, None)


def main(argv=None):
    args = parse_args(argv)
    for stream in (sys.stdout, sys.stderr):  # file names may hold what the screen cannot show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        run(args)
    except Exception as error:
        if not (line := explain(error)):
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    # After an error the others are still waiting for this process, which must not wait for them.
    end_processes()
    return 0


if __name__ == "__main__":
    sys.exit(main())
