"""Several workers: gradient and adapter of one process, one writer; a dead one ends the run and its work is kept."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxtune import checkpoint
from mlxtune.workers import ALONE, Workers, join

GRADIENT = """
import hashlib, sys
import mlx.core as mx
import numpy as np
from mlxtune import machine
machine.prepare()
machine.configure()
from mlxtune import adapter, gradient, likelihood, model, workers
from mlxtune.data.batches import make_batch
from mlxtune.data.render import Sample
from mlxtune.recipe import LoraRecipe
from mlxtune.vectors import Vectors

rows = [(5 + 3 * (number % 4), 1 + number % 4) for number in range(7)]
samples = [
    Sample(f"r:{n}", [(31 * n + 7 * t) % 900 + 10 for t in range(length)], [t >= length - k for t in range(length)],
           length - k, "x")
    for n, (length, k) in enumerate(rows)
]
lm = model.load(__import__("pathlib").Path(sys.argv[1]))
adapter.attach(lm, LoraRecipe(rank=4), seed=1)
draws = np.random.default_rng(5)
noisy = [(n, mx.array(draws.normal(0, 0.05, w.shape).astype(np.float32)))
         for n, w in adapter.trained(lm.net).items() if n.endswith("lora_b")]
lm.net.load_weights(noisy, strict=False)
vectors = Vectors.of(lm.net, joined=True)
function = gradient.value_and_grad(lm.net, vectors, False)
together = workers.join()
tokens = sum(each.trained_count for each in samples)
alone = gradient.token_weighted(function, vectors, [make_batch(samples, list(range(7)))], tokens)
for parts in ([list(range(7))], [[0, 1, 2, 3], [4, 5, 6]], [[row] for row in range(7)], [[3], [0, 1, 2, 4, 5, 6]]):
    mine = [share for part in parts if (share := together.share(part))]
    batches = [make_batch(samples, part) for part in mine]
    loss, found = gradient.token_weighted(function, vectors, batches, tokens, together)
    assert abs(loss - alone[0]) <= 1e-5 * alone[0], (loss, alone[0])
    expected = vectors.apart(alone[1])
    for name, one in vectors.apart(found).items():
        one, other = np.array(one, dtype=np.float64), np.array(expected[name], dtype=np.float64)
        assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(other), name
    print(hashlib.sha256(b"".join(np.array(each).tobytes() for each in found.values())).hexdigest())
share = likelihood.mean_nats(lm.net, samples, 2, together)
assert abs(share - likelihood.mean_nats(lm.net, samples, 2)) <= 1e-5 * share
assert together.value_from_first({"rank": together.rank, "text": "\\u00e9"}) == {"rank": 0, "text": "\\u00e9"}
assert together.highest(together.rank) == together.size - 1
"""


Start = Callable[..., list["subprocess.Popen[bytes]"]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a process a worker, as `mlx.launch --backend ring` does, with its output in files of `tmp_path`."""
    running: list[subprocess.Popen[bytes]] = []

    def started(command: list[str], count: int = 2) -> list[subprocess.Popen[bytes]]:
        held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
        hosts = tmp_path / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{each.getsockname()[1]}"] for each in held]))
        for each in held:
            each.close()
        for rank in range(count):
            env = {**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts), "TMPDIR": str(tmp_path)}
            with (tmp_path / f"out-{rank}").open("w") as out, (tmp_path / f"err-{rank}").open("w") as err:
                running.append(subprocess.Popen(command, cwd=tmp_path, env=env, stdout=out, stderr=err))
        return running[-count:]

    yield started
    for each in running:
        each.kill()
        each.wait()


def said(folder: Path, rank: int) -> str:
    """What a worker printed to stderr, without the lines of MLX itself."""
    lines = (folder / f"err-{rank}").read_text().splitlines()
    return "\n".join(line for line in lines if line and not line.startswith("[ring]"))


def train_command(out: str, *more: str) -> list[str]:
    settings = "--iters 6 --batch-size 4 --num-layers 1 --set lora.rank=2 --learning-rate 1e-3 --set train.eval_every=3"
    report = "--set train.report_every=1 --set train.show_answer=false --json"
    command = [sys.executable, "-m", "mlxtune", "train", "--model", "tiny", "--data", "data", "--out", out]
    return [*command, *settings.split(), *report.split(), *more]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a few rows of data."""
    (tmp_path / "data").mkdir()
    for name, count in (("train", 9), ("valid", 3), ("test", 2)):
        rows = [{"prompt": f"Where is {name} {n}?", "completion": f"At place {n} of {n + 3}."} for n in range(count)]
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("count", [2, 3])
def test_the_gradient_of_shards_is_that_of_one_batch(start: Start, tiny: Path, tmp_path: Path, count: int) -> None:
    (tmp_path / "script.py").write_text(GRADIENT)
    codes = [each.wait() for each in start([sys.executable, "script.py", str(tiny)], count)]
    assert codes == [0] * count, [said(tmp_path, rank) for rank in range(count)]
    hashes = [(tmp_path / f"out-{rank}").read_text() for rank in range(count)]
    assert len(set(hashes)) == 1  # the same bits on each, so the adapters stay the same
    assert len(hashes[0].splitlines()) == 4


def test_two_workers_train_the_adapter_of_one(start: Start, folder: Path) -> None:
    """On a base that each of them quantizes for itself."""
    done = subprocess.run(train_command("one", "--q-bits", "8"), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    codes = [each.wait() for each in start(train_command("two", "--q-bits", "8"))]
    assert codes == [0, 0], (said(folder, 0), said(folder, 1))
    assert (folder / "out-1").read_text() == said(folder, 1) == ""  # the first alone speaks
    assert json.loads((folder / "out-0").read_text())["training"]["steps"] == 6
    assert {each.name for each in (folder / "two").iterdir()} == {each.name for each in (folder / "one").iterdir()}
    assert not list(folder.glob("mlxtune-worker-*"))
    logs = [
        [(line["step"], line["train_loss"], line["valid_loss"] or 0.0) for line in map(json.loads, text.splitlines())]
        for text in ((folder / name / "log.jsonl").read_text() for name in ("one", "two"))
    ]
    for one, two in zip(*logs, strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    one, two = (mx.load(str(folder / name / "adapter" / "adapters.safetensors")) for name in ("one", "two"))
    assert isinstance(one, dict)
    assert isinstance(two, dict)
    for name in one:
        np.testing.assert_allclose(np.array(two[name]), np.array(one[name]), rtol=1e-3, atol=2e-6)
    # a run that is done is left alone, and the helper does not wait for it
    again = [each.wait(timeout=60) for each in start(train_command("two", "--q-bits", "8"))]
    assert again == [0, 0]
    assert "skipped: done already" in said(folder, 0)


@pytest.mark.parametrize(("dying", "code"), [(1, 1), (0, 1)])
def test_a_dead_worker_ends_the_run_and_nothing_is_lost(start: Start, folder: Path, dying: int, code: int) -> None:
    command = train_command("run", "--iters", "4000", "--set", "train.save_every=5", "--set", "train.eval_every=2000")
    running = start(command)
    log = folder / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) >= 8):
        assert time.monotonic() < deadline, (said(folder, 0), said(folder, 1))
        assert [each.poll() for each in running] == [None, None], (said(folder, 0), said(folder, 1))
        time.sleep(0.05)
    running[dying].kill()
    assert running[1 - dying].wait(timeout=60) == code
    running[dying].wait()
    (error,) = [line for line in said(folder, 1 - dying).splitlines() if "error" in line]
    found, damaged = checkpoint.newest(folder / "run" / "checkpoints")
    assert found is not None
    assert damaged == []
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    if dying == 1:
        assert error.startswith("error: another worker of this run has ended")
        assert error.endswith("run/checkpoints keeps what was done; run the same command to go on")
        assert found.step == steps[-1]  # to the last update that all of them did
    else:
        assert error.startswith("error: worker 1: another worker of this run has ended")
        assert found.step in (steps[-1] // 5 * 5, (steps[-1] - 1) // 5 * 5)  # it may have died before it saved
    # one process goes on where several stopped
    rest = train_command("run", "--iters", "4000", "--set", "train.save_every=5", "--set", "train.eval_every=2000")
    alone = subprocess.Popen(rest, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while len(log.read_text().splitlines()) < steps[-1] + 2 and alone.poll() is None:
        time.sleep(0.05)
    alone.send_signal(signal.SIGTERM)
    _, told = alone.communicate(timeout=60)
    assert alone.returncode == 143, told
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()][: steps[-1]] == steps


def test_a_signal_to_any_worker_stops_all_after_a_checkpoint(start: Start, folder: Path) -> None:
    running = start(train_command("run", "--iters", "4000", "--set", "train.eval_every=2000"))
    log = folder / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline, (said(folder, 0), said(folder, 1))
        time.sleep(0.05)
    running[1].send_signal(signal.SIGTERM)
    assert [each.wait(timeout=60) for each in running] == [143, 143]
    found, _ = checkpoint.newest(folder / "run" / "checkpoints")
    assert found is not None
    assert found.step == json.loads(log.read_text().splitlines()[-1])["step"]


def test_workers_with_other_rows_are_refused(start: Start, folder: Path) -> None:
    other = folder / "other"
    other.mkdir()
    for each in (folder / "data").iterdir():
        (other / each.name).write_text(each.read_text().replace("place", "spot"))
    script = folder / "script.py"
    script.write_text(
        "import os, sys\n"
        "from mlxtune.cli import main\n"
        "if os.environ['MLX_RANK'] == '1':\n"
        "    sys.argv[sys.argv.index('data')] = 'other'\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, str(script), *train_command("run")[3:]]
    assert [each.wait(timeout=120) for each in start(command)] == [2, 2]
    line = "error: the workers have different rows, models or recipes; give each of them the same files and versions"
    assert said(folder, 0).splitlines()[-1] == line
    assert said(folder, 1) == line.replace("error: ", "error: worker 1: ")


def test_one_process_is_a_run_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert join() is ALONE
    assert ALONE.first
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]
    assert ALONE.summed([0.1]) == [0.1]  # not rounded to float32
    assert ALONE.highest(15) == 15
    assert ALONE.value_from_first({"a": 1}) == {"a": 1}
    ALONE.agree(b"abc", "rows")


def test_a_worker_without_others_is_told_so(folder: Path) -> None:
    env = {**os.environ, "MLX_RANK": "1"}
    done = subprocess.run(train_command("run"), cwd=folder, env=env, capture_output=True, text=True)
    line = "error: worker 1: was started as worker 1, but MLX meets no others; start them with mlx.launch\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)
    assert not (folder / "run").exists()


def test_shares_are_every_row_once() -> None:
    for size in range(1, 5):
        for rows in range(9):
            shares = [Workers(rank, size).share(range(rows)) for rank in range(size)]
            assert sorted(sum(shares, [])) == list(range(rows))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
