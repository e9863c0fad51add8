"""Valid options, configs, checkpoints, data and model files, changed at random until something breaks.

Whatever a user gives, a command has to end with its exit code and one line, a function with its documented error; no
file may be lost, memory is bounded, and the process has to live. Each case is fixed by its name, such as
``checkpoint:17``, which is printed where it fails and which ``--case`` repeats:

    python tests/library/fuzz/fuzz.py --seconds 600
    python tests/library/fuzz/fuzz.py --case checkpoint:17
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from checkpoint_files import rewrite_checkpoint
from idx_files import write_idx_folder
from image_folders import write_classes
from mutations import change_tensors, changed_bytes, changed_json, changed_text, strange_value
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved_files import rewrite
from torch import nn

import bmrs
import bmrs.cli
from bmrs.data import DataError, load_dataset
from bmrs.training import RunError, TrainConfig, devices, summary
from bmrs.training import run as runs
from bmrs.training.algorithm1 import new_state
from bmrs.training.checkpoint import load_checkpoint

MEMORY = 3 * 2**30
"""Bytes that the process may take beyond what it has at the start."""
SECONDS_OF_CASE = 20
LONGEST_LINE = 1100
CPU = torch.device("cpu")
TARGETS = {}


def target(function):
    """Register what takes a source of random numbers and a corpus, and raises if something is wrong."""
    TARGETS[function.__name__] = function
    return function


class TooSlow(BaseException):
    """Not an error that anything would handle."""


class Corpus:
    """Valid files, made once, in a folder; a scratch folder for each case."""

    def __init__(self, folder):
        self.folder = folder
        self.scratch = folder / "scratch"
        self.images = write_idx_folder(folder / "images", train=30, test=10)
        self.options = {
            "recipe": "paper",
            "data": "mnist",
            "data_dir": str(self.images),
            "model": "mlp",
            "num_blocks": 1,
            "hidden": 4,
            "epochs": 1,
            "fine_tune_epochs": 0,
            "batch_size": 16,
            "device": "cpu",
            "criterion": "snr",
            "threshold": 1.0,
        }
        self.run = folder / "run"
        self.recipe = {**self.options, "recipe": "bmrs", "noise_epochs": 1, "fine_tune_epochs": 1}
        for options, path in ((self.options, self.run), (self.recipe, folder / "recipe-run")):
            assert command("train", *as_arguments(options), "--output", path) == (0, "")
        self.runs = (self.run, folder / "recipe-run")
        self.config = TrainConfig(**json.loads((self.run / "config.json").read_text()))
        self.data = runs.load(self.config, CPU)
        self.cifar = cifar_folder(folder / "cifar")
        self.pictures = write_pictures(folder / "pictures")
        self.models = model_files(folder)

    def fresh(self):
        """An empty scratch folder."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        return self.scratch


def as_arguments(options):
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def cifar_folder(folder):
    folder.mkdir()
    pixels = (torch.arange(4 * 3072) % 256).to(torch.uint8).view(4, 3072).numpy()
    content = pickle.dumps({b"data": pixels, b"labels": [0, 1, 2, 9]}, protocol=2)
    content = content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    for name in (
        "data_batch_1",
        "data_batch_2",
        "data_batch_3",
        "data_batch_4",
        "data_batch_5",
        "test_batch",
    ):
        (folder / name).write_bytes(content)
    return folder


def write_pictures(folder):
    write_classes(folder, images=4, size=12)
    for place, path in enumerate(sorted(folder.rglob("*.png"))):
        suffix = ("jpg", "webp", "gif", "bmp", "tif", "jp2", "tga", "ppm")[place]
        with Image.open(path) as image:
            image.save(path.with_suffix(f".{suffix}"))
    return folder


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.drop = nn.Dropout(0.1)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.tanh(x + self.second(x)).mean((2, 3))
        return self.last(self.drop(torch.cat([x[:, :2], x[:, 2:]], 1)))


def model_files(folder):
    """Paths with an example and a function that makes a network of the class."""
    torch.manual_seed(0)
    image = torch.randn(2, 1, 8, 8)
    chain = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.LeakyReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(27, 4),
        nn.Softmax(1),
    ).eval()
    bmrs.save(folder / "chain.safetensors", chain)
    bmrs.save(folder / "graph.safetensors", Residual().eval(), example_inputs=image)
    words = torch.randn(3, 2, 4)
    bmrs.save(
        folder / "recurrent.safetensors", nn.LSTM(4, 3, bidirectional=True).eval(), example_inputs=words
    )
    return [
        (folder / "chain.safetensors", image, None),
        (folder / "graph.safetensors", image, Residual),
        (folder / "recurrent.safetensors", words, lambda: nn.LSTM(4, 3, bidirectional=True)),
    ]


# How things have to end.


def command(*argv):
    """Run a command; return its exit code and what it wrote to stderr."""
    error = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        code = bmrs.cli.main([str(argument) for argument in argv])
    return code, error.getvalue()


def judged(*argv):
    """Run a command, check how it ends, and return its exit code."""
    code, text = command(*argv)
    lines = text.splitlines()
    assert code in (0, 1, 2), f"exit code {code}"
    assert len(lines) == (code != 0), f"{len(lines)} lines on stderr with exit code {code}: {text[:500]!r}"
    assert not lines or lines[0].startswith("bmrs: error: "), lines[0]
    assert not lines or len(lines[0]) <= LONGEST_LINE, f"a line of {len(lines[0])} characters"
    return code


@contextlib.contextmanager
def may_raise(*kinds):
    """Let documented errors pass that say in one line what is wrong."""
    try:
        yield
    except kinds as error:
        text = str(error)
        assert text, "an error without a message"
        assert len(text.splitlines()) == 1, f"{len(text.splitlines())} lines: {text[:500]!r}"
        assert len(text) <= LONGEST_LINE, f"a message of {len(text)} characters: {text[:200]!r}"


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def is_cheap(config):
    settings = config.resolved().settings
    steps = (settings.epochs + settings.fine_tune_epochs + (settings.noise_epochs or 0)) * config.seeds
    return steps <= 3 and (settings.hidden or 100) * ((settings.num_blocks or 0) + 1) <= 100


def train_or_check(config, *, output, console):
    """Stands for `train`: trains only where that is quick, and one time in five."""
    if is_cheap(config) and zlib.crc32(repr(config).encode()) % 5 == 0:
        return runs.train(config, output=output, console=console)
    config = config.resolved()
    device = devices.device_of(config)
    data = runs.load(config, device)
    if is_cheap(config):
        new_state(config, data, noise=True, device=device)
    return []


# Targets.


@target
def options(random, corpus):
    given = dict(random.choice((corpus.options, corpus.recipe)))
    for _ in range(random.choice((1, 1, 2, 3))):
        name = random.choice([*bmrs.cli._OPTIONS, "output", "config", "resume", "nothing"])
        value = (
            strange_value(random) if random.random() < 0.7 else changed_json(random, corpus.options.get(name))
        )
        given[name] = value if isinstance(value, str) else shown(value)
    folder = corpus.fresh()
    # Runs without --output go into the folder that one is in.
    output = [] if "output" in given else [f"--output={folder / 'run'}"]
    arguments = [x for x in as_arguments(given) if not x.startswith("--output=/")]
    if random.random() < 0.3:
        arguments = [part for argument in arguments for part in argument.split("=", 1)]
    with contextlib.chdir(folder) if hasattr(contextlib, "chdir") else changed_folder(folder):
        if judged("train", *arguments, *output) == 2:
            assert not (folder / "run").exists(), "a bad command left a folder"


@contextlib.contextmanager
def changed_folder(folder):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def shown(value):
    try:
        return json.dumps(value)
    except ValueError:
        return "1" * 5000


@target
def options_file(random, corpus):
    folder = corpus.fresh()
    path = folder / "settings.yaml"
    path.write_bytes(changed_file_of_json(random, corpus.options))
    if judged("train", "--config", path, "--output", folder / "run") == 2:
        assert [p.name for p in folder.iterdir()] == ["settings.yaml"], "a bad config left something"


def changed_file_of_json(random, value):
    kind = random.choice(("tree", "tree", "tree", "text", "bytes", "encoding"))
    if kind == "tree":
        return json.dumps(changed_json(random, value)).encode("utf-8", "surrogatepass")
    if kind == "text":
        return changed_text(random, value).encode()
    content = json.dumps(value)
    if kind == "bytes":
        return changed_bytes(random, content.encode())
    return content.encode(random.choice(("utf-16", "utf-32", "utf-8-sig", "cp037")))


@target
def run_config(random, corpus):
    run = shutil.copytree(random.choice(corpus.runs), corpus.fresh() / "run")
    config = run / "config.json"
    config.write_bytes(changed_file_of_json(random, json.loads(config.read_text())))
    _judge_run(random, run)


def _judge_run(random, run):
    before = contents(run)
    if random.random() < 0.5:
        judged("evaluate", run)
        assert contents(run) == before, "evaluate changed files"
    elif judged("train", "--resume", run) == 2:
        assert contents(run) == before, "a refused run lost or changed files"


@target
def checkpoint(random, corpus):
    path = corpus.fresh() / "checkpoint.safetensors"
    shutil.copy(corpus.run / "checkpoint.safetensors", path)
    change_checkpoint(random, path)
    state = new_state(corpus.config, corpus.data, noise=True, device=CPU)
    before = [tensor.clone() for tensor in state.model.state_dict().values()]
    generators = torch.get_rng_state(), state.order.get_state()
    refused = True
    with may_raise(RunError):
        load_checkpoint(path, state, corpus.config)
        refused = False
    if refused:
        assert all(map(torch.equal, before, state.model.state_dict().values())), "half loaded: the model"
        assert not state.optimizer.state, "half loaded: the optimizer"
        assert torch.equal(torch.get_rng_state(), generators[0]), "half loaded: torch's generator"
        assert torch.equal(state.order.get_state(), generators[1]), "half loaded: the order"
        assert not state.history, "half loaded: the history"
        return
    # What was taken over has to bear a step.
    loss = nn.functional.cross_entropy(
        state.model.train()(corpus.data.train.images), corpus.data.train.labels
    )
    loss.backward()
    state.optimizer.step()
    torch.randperm(1000, generator=state.order)


def change_checkpoint(random, path):
    kind = random.choice(("bytes", "tensors", "tensors", "scalars", "scalars"))
    if kind == "bytes":
        path.write_bytes(changed_bytes(random, path.read_bytes()))
        return

    def change(scalars, tensors):
        if kind == "tensors":
            change_tensors(random, tensors)
        else:
            changed = changed_json(random, scalars)
            scalars.clear()
            scalars.update(changed if isinstance(changed, dict) else {"history": changed})

    rewrite_checkpoint(path, change, checksum=random.random() < 0.9)


@target
def run_files(random, corpus):
    run = shutil.copytree(random.choice(corpus.runs), corpus.fresh() / "run")
    path = random.choice(sorted(run.glob("*.safetensors")))
    name = path.name.removesuffix(".safetensors")
    kind = random.choice(("delete", "swap", "bytes", "own", "own"))
    if kind == "delete":
        path.unlink()
    elif kind == "swap":
        other = random.choice(
            (corpus.models[0][0], run / "dense.safetensors", run / "checkpoint.safetensors")
        )
        path.write_bytes(other.read_bytes())
    elif kind == "bytes":
        path.write_bytes(changed_bytes(random, path.read_bytes()))
    elif "checkpoint" in name:
        change_checkpoint(random, path)
    elif name == "dense":
        tensors = load_file(path)
        change_tensors(random, tensors)
        save_file(tensors, path)
    else:
        change_model(random, path)
    _judge_run(random, run)


@target
def data(random, corpus):
    name, source = random.choice((("mnist", corpus.images), ("cifar10", corpus.cifar)))
    folder = shutil.copytree(source, corpus.fresh() / "data")
    path = random.choice(sorted(folder.iterdir()))
    if random.random() < 0.1:
        path.unlink()
    else:
        content = path.read_bytes()
        for _ in range(random.choice((1, 1, 3))):
            content = changed_bytes(random, content)
        path.write_bytes(content)
    with may_raise(DataError, FileNotFoundError):
        read = load_dataset(name, folder)
        for split in (read.train, read.validation, read.test):
            assert split.images.dtype == torch.uint8
            assert len(split.images) == len(split.labels) > 0
            assert 0 <= split.labels.min() <= split.labels.max() < 10


@target
def pictures(random, corpus):
    folder = shutil.copytree(corpus.pictures, corpus.fresh() / "pictures")
    for path in random.sample(sorted(folder.rglob("*.*")), 5):
        path.write_bytes(changed_bytes(random, path.read_bytes()))
    with may_raise(DataError):
        read = load_dataset(
            f"folder:{folder}",
            image_size=8,
            workers=0,
            cache=corpus.scratch / "cache",
            skip_unreadable=random.random() < 0.7,
        )
        for split in (read.train, read.validation, read.test):
            (batch,) = split.in_order(len(split))
            assert batch.images.shape[1:] in ((1, 8, 8), (3, 8, 8))
            assert 0 <= batch.labels.min() <= batch.labels.max() < 2


@target
def model_file(random, corpus):
    source, example, network = random.choice(corpus.models)
    path = corpus.fresh() / "model.safetensors"
    shutil.copy(source, path)
    change_model(random, path)
    with may_raise(ValueError):
        model = bmrs.load(path)
        assert isinstance(model, nn.Module)
        assert not any(module.training for module in model.modules())
        # An input that it does not take is an error of its own kind, but no crash.
        with contextlib.suppress(Exception), torch.no_grad():
            model(example)
    if network is not None:
        fresh = network()
        before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
        refused = True
        with may_raise(ValueError):
            loaded = bmrs.load(path, model=fresh)
            refused = False
            with contextlib.suppress(Exception), torch.no_grad():
                loaded(example)
        if refused:
            after = fresh.state_dict()
            assert before.keys() == after.keys()
            assert all(torch.equal(before[key], after[key]) for key in before), "half loaded"


def change_model(random, path):
    if random.random() < 0.2:
        path.write_bytes(changed_bytes(random, path.read_bytes()))
        return
    if random.random() < 0.2:
        with safe_open(path, framework="pt") as file:
            description = json.loads(file.metadata()["bmrs"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(tensors, path, metadata={"bmrs": changed_text(random, description)})
        return

    def change(description, tensors):
        if random.random() < 0.3:
            change_tensors(random, tensors)
            return None
        return changed_json(random, description)

    rewrite(path, change)


# Running cases.


def run_case(name, corpus):
    """Run a case; return a traceback if it failed."""
    kind, _, number = name.partition(":")
    assert number.isdigit()

    def too_slow(*_):
        raise TooSlow(f"took more than {SECONDS_OF_CASE} s")

    # Of the process, as a busy machine is none of its faults.
    signal.signal(signal.SIGPROF, too_slow)
    signal.setitimer(signal.ITIMER_PROF, SECONDS_OF_CASE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            TARGETS[kind](random.Random(name), corpus)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return None


def bound_memory():
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each target")
    parser.add_argument("--target", choices=TARGETS, nargs="*", default=list(TARGETS))
    parser.add_argument("--case", nargs="*")
    parser.add_argument(
        "--last-case", type=Path, help="file that names the case that runs, should the process die"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    # What takes long and has nothing to do with files.
    runs.draw = lambda *_: None
    summary.latency = lambda models, *_: [1.0] * len(models)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus(Path(folder).resolve())
        bmrs.training.train = train_or_check
        bound_memory()
        end = time.monotonic() + given.seconds
        names = given.case or (f"{kind}:{i}" for i in itertools.count(given.first) for kind in given.target)
        failures, cases, slowest = 0, 0, (0.0, "none")
        for name in names:
            # Each target once, however slow the machine is.
            if not given.case and cases >= len(given.target) and time.monotonic() > end:
                break
            if given.last_case is not None:
                given.last_case.write_text(name)
            cases += 1
            start = time.monotonic()
            if (wrong := run_case(name, corpus)) is not None:
                failures += 1
                print(f"=== {name}\n{wrong}", flush=True)
            slowest = max(slowest, (time.monotonic() - start, name))
        print(f"{cases} cases, {failures} failed; {slowest[1]} took {slowest[0]:.1f} s", flush=True)
    return failures != 0


if __name__ == "__main__":
    sys.exit(main())
