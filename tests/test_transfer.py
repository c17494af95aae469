"""Files on their way: whatever the link does to the blocks, the right file arrives, and nothing that has come is asked for twice."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import disks
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.errors import DatasetChecksum, DiskFull, Refused
from edge_agent.files import link_file, write_directory, write_file
from edge_agent.messages import BLOCK_BYTES, WINDOW_BLOCKS, FileRequest, decode, encode
from edge_agent.transfer import LONGEST_RETRY_S, MOST_MISMATCHES, RETRY_S, FileStore, Incoming

BLOCK = 1024
ROUNDS = 5_000
EMPTY = hashlib.sha256(b"").hexdigest()


def _bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def _keep(store: FileStore, data: bytes) -> str:
    sha256 = hashlib.sha256(data).hexdigest()
    store.put(data, sha256)
    return sha256


class Ends:
    """A sender and a receiver in two directories, and every request between them."""

    def __init__(self, root: Path, data: bytes, block_bytes: int = BLOCK) -> None:
        self.sender, self.receiver = FileStore(root / "sender"), FileStore(root / "receiver")
        self.data, self.sha256, self.block_bytes = data, _keep(self.sender, data), block_bytes
        self.incoming = self.begin()

    def begin(self) -> Incoming:
        """The receiver is started, or started again; requests of an earlier one are lost."""
        self.requests: list[FileRequest] = []
        self.incoming = Incoming(self.receiver, self.sha256, len(self.data), self.block_bytes, self.ask)
        return self.incoming

    def ask(self, request: FileRequest) -> bool:
        self.requests.append(decode(encode(request, "test"), FileRequest).data)
        return True

    def answers(self) -> list[tuple[int, bytes]]:
        """The blocks that answer all requests so far."""
        requests, self.requests = self.requests, []
        return [block for request in requests for block in self.sender.read_blocks(self.sha256, request)]

    def exchange(self) -> list[int]:
        """Hand over block after block without loss until the file is there; return the numbers that were asked for."""
        asked: list[int] = []
        deadline = len(self.data) // self.block_bytes + 100
        done = self.incoming.tick()
        while not done:
            deadline -= 1
            assert deadline > 0
            answers = self.answers()
            asked += [number for number, _ in answers]
            for number, block in answers:
                done = self.incoming.receive(number, block) or done
            done = done or self.incoming.tick()
        return asked

    def arrived(self) -> bool:
        """Whether the right file is in its place and nothing is left of its transfer."""
        left = [*self.receiver.incoming.iterdir(), *self.receiver.path(EMPTY).parent.glob(".*")]
        return self.receiver.path(self.sha256).read_bytes() == self.data and left == []


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path


class Lossy:
    """A link that drops, repeats, reorders, delays, damages and cuts off blocks, and loses requests. After `faults` of them it is good."""

    def __init__(self, ends: Ends, seed: int, faults: int) -> None:
        self._ends, self._rng, self._faults = ends, random.Random(seed), faults
        self._delayed: list[tuple[int, bytes]] = []

    def _fault(self, share: float) -> bool:
        if self._faults <= 0 or self._rng.random() >= share:
            return False
        self._faults -= 1
        return True

    def carry(self) -> list[tuple[int, bytes]]:
        """What arrives of the blocks that were asked for, and of those delayed before."""
        if self._fault(0.1):
            self._ends.requests.clear()
        arriving, self._delayed = self._delayed, []
        for number, block in self._ends.answers():
            if self._fault(0.1):
                continue
            if self._fault(0.02):
                block = bytes(byte ^ 1 for byte in block[:1]) + block[1:]
            if self._fault(0.05):
                block = block[:-1]
            if self._fault(0.05):
                number += self._rng.randrange(1, 1000)
            if self._fault(0.1):
                self._delayed.append((number, block))
            if not self._fault(0.1):
                arriving.append((number, block))
        if self._fault(0.5):
            self._rng.shuffle(arriving)
        return arriving

    def restarts(self) -> bool:
        return self._fault(0.05)

    def breaks(self) -> bool:
        return self._fault(0.05)


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 40 * BLOCK) | st.sampled_from([BLOCK, BLOCK + 1, 8 * BLOCK, 9 * BLOCK]),
    faults=st.integers(0, 120),
)
def test_right_file_arrives_over_a_bad_link(seed: int, size: int, faults: int) -> None:
    """Blocks are lost, repeated, reordered, delayed, damaged, cut off and misnumbered, requests are lost, the link breaks and the
    receiver restarts: in the end the file that was named is there, and no part of it is left over."""
    with TemporaryDirectory() as directory:
        ends = Ends(Path(directory), _bytes(size, seed))
        link = Lossy(ends, seed, faults)
        now, done = time.monotonic(), False
        for _ in range(ROUNDS):
            now += LONGEST_RETRY_S + RETRY_S
            if link.restarts():
                ends.begin()
            if link.breaks():
                ends.incoming.ask_again()
            done = ends.incoming.tick(now)
            for number, block in link.carry() if not done else ():
                done = ends.incoming.receive(number, block)
                if done:
                    break
            if done:
                break
        assert done
        assert ends.arrived()


@pytest.mark.parametrize("blocks", [0, 1, 2, WINDOW_BLOCKS, WINDOW_BLOCKS + 1])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_size_at_the_edge_of_a_block(blocks: int, more: int, root: Path) -> None:
    """Each block is asked for once and in order, whether the last one is full, lacks a byte or holds a single one."""
    size = max(0, blocks * BLOCK + more)
    ends = Ends(root, _bytes(size))
    assert ends.exchange() == list(range(-(-size // BLOCK)))
    assert ends.arrived()


def test_block_size_of_the_contract(root: Path) -> None:
    """However much a broker takes, no block is larger than the contract's; a broker that takes less gets smaller ones."""
    ends = Ends(root, _bytes(BLOCK_BYTES + 1), block_bytes=10 * BLOCK_BYTES)
    ends.incoming.tick()
    [request] = ends.requests
    assert (request.block_bytes, request.blocks) == (BLOCK_BYTES, [0, 1])


def test_window_is_never_passed(root: Path) -> None:
    """At most a window of blocks is on its way, and the next one is asked for when the last block of it has come."""
    ends = Ends(root, _bytes(20 * BLOCK))
    ends.incoming.tick()
    [request] = ends.requests
    assert request.blocks == list(range(WINDOW_BLOCKS))
    answers = ends.answers()
    for number, block in answers[1:]:
        assert not ends.incoming.receive(number, block)
        assert ends.requests == []
    assert not ends.incoming.receive(*answers[0])
    assert [r.blocks for r in ends.requests] == [list(range(WINDOW_BLOCKS, 2 * WINDOW_BLOCKS))]


def test_blocks_that_stay_away_are_asked_for_again(root: Path) -> None:
    """Not before the pause is over, then only those missing, with growing pauses; at once when the link is new."""
    ends = Ends(root, _bytes(3 * BLOCK))
    now = time.monotonic()
    ends.incoming.tick(now)
    ends.incoming.tick(now + RETRY_S / 2)
    assert [r.blocks for r in ends.requests] == [[0, 1, 2]]
    number, block = ends.answers()[1]
    ends.incoming.receive(number, block)
    ends.incoming.tick(now + RETRY_S)
    ends.incoming.tick(now + 2 * RETRY_S)
    assert [r.blocks for r in ends.requests] == [[0, 2]]
    ends.incoming.ask_again()
    ends.incoming.tick(now + 2 * RETRY_S)
    assert [r.blocks for r in ends.requests] == [[0, 2], [0, 2]]


def test_request_that_did_not_go_out_is_not_awaited(root: Path) -> None:
    """Without a link nothing was asked for, so the next tick asks."""
    ends = Ends(root, _bytes(BLOCK))
    tries: list[FileRequest] = []

    def ask(request: FileRequest) -> bool:
        tries.append(request)
        return len(tries) == 3

    incoming, now = Incoming(ends.receiver, ends.sha256, BLOCK, BLOCK, ask), time.monotonic()
    for _ in range(5):
        assert not incoming.tick(now)
    assert len(tries) == 3


def test_foreign_block_changes_nothing(root: Path) -> None:
    """A block beyond the end, of a wrong length or one that is there already is not kept, whatever it holds."""
    ends = Ends(root, _bytes(2 * BLOCK + 5))
    whole, rest = b"\xff" * BLOCK, b"\xff" * 5
    for number, block in ((3, whole), (10**9, whole), (0, whole[:-1]), (0, whole + b"x"), (0, b""), (2, whole)):
        assert not ends.incoming.receive(number, block)
    assert ends.incoming.missing_blocks == 3
    assert not ends.incoming.receive(0, ends.data[:BLOCK])
    assert not ends.incoming.receive(0, whole)
    assert ends.incoming.missing_blocks == 2
    assert rest != ends.data[2 * BLOCK :]
    assert ends.exchange() == [1, 2]
    assert ends.arrived()


@pytest.mark.parametrize("had", [1, 5, WINDOW_BLOCKS, 19])
def test_receiver_made_anew_asks_only_for_the_rest(had: int, root: Path) -> None:
    """What has come before a restart is not asked for again."""
    ends = Ends(root, _bytes(20 * BLOCK + 1))
    order = random.Random(had).sample(range(21), had)
    for number in order:
        ends.incoming.receive(number, ends.data[number * BLOCK : (number + 1) * BLOCK])
    assert ends.begin().missing_blocks == 21 - had
    assert ends.exchange() == [k for k in range(21) if k not in order]
    assert ends.arrived()


def test_receiver_made_anew_with_all_blocks(root: Path) -> None:
    """A restart between the last block and the check of the file asks for nothing and finishes."""
    ends = Ends(root, _bytes(2 * BLOCK))
    (ends.receiver.incoming / f"{ends.sha256}.{BLOCK}.part").write_bytes(ends.data)
    (ends.receiver.incoming / f"{ends.sha256}.{BLOCK}.map").write_bytes(b"\1\1")
    ends.begin()
    assert ends.exchange() == []
    assert ends.arrived()


@pytest.mark.parametrize("broken", ["no map", "short map", "no part"])
def test_remains_that_do_not_belong_together(broken: str, root: Path) -> None:
    """A part without its map, or a map that does not fit, is no progress: the file is fetched from the start and is right."""
    ends = Ends(root, _bytes(4 * BLOCK))
    ends.incoming.receive(0, ends.data[:BLOCK])
    part, blocks = (ends.receiver.incoming / f"{ends.sha256}.{BLOCK}.{kind}" for kind in ("part", "map"))
    match broken:
        case "no map":
            blocks.unlink()
        case "short map":
            blocks.write_bytes(b"\1")
        case _:
            part.unlink()
    ends.begin()
    assert ends.exchange() == [0, 1, 2, 3]
    assert ends.arrived()


def test_another_block_size_begins_anew(root: Path) -> None:
    """A broker with another limit changes the blocks: what came in the old ones is not mixed with the new."""
    ends = Ends(root, _bytes(8 * BLOCK))
    ends.incoming.receive(1, ends.data[BLOCK : 2 * BLOCK])
    ends.block_bytes = 3 * BLOCK
    ends.begin()
    assert ends.exchange() == [0, 1, 2]
    assert ends.receiver.path(ends.sha256).read_bytes() == ends.data


def test_damaged_part_is_thrown_away(root: Path) -> None:
    """A byte that changed on the disk of the receiver is found at the end; then everything is fetched again and is right."""
    ends = Ends(root, _bytes(3 * BLOCK))
    for number in (0, 1):
        ends.incoming.receive(number, ends.data[number * BLOCK : (number + 1) * BLOCK])
    [part] = ends.receiver.incoming.glob("*.part")
    with part.open("r+b") as file:
        file.write(bytes([ends.data[0] ^ 1]))
    assert not ends.incoming.receive(2, ends.data[2 * BLOCK :])
    ends.requests.clear()
    assert not ends.receiver.has(ends.sha256)
    assert ends.incoming.missing_blocks == 3
    assert not ends.incoming.tick()
    assert ends.requests == [], "after a pause"
    ends.incoming.ask_again()
    assert ends.exchange() == [0, 1, 2]
    assert ends.arrived()


def test_another_file_again_and_again_is_an_error(root: Path) -> None:
    """A sender whose file never has the digest that it names is given up, and what has come of it is deleted."""
    ends = Ends(root, _bytes(2 * BLOCK))
    wrong = bytes(2 * BLOCK)
    now = time.monotonic()
    for _ in range(MOST_MISMATCHES):
        now += LONGEST_RETRY_S
        assert not ends.incoming.tick(now)
        for number in (0, 1):
            assert not ends.incoming.receive(number, wrong[number * BLOCK : (number + 1) * BLOCK])
    with pytest.raises(DatasetChecksum):
        ends.incoming.tick(now)
    assert list(ends.receiver.incoming.iterdir()) == []


def test_discarded_transfer_leaves_nothing(root: Path) -> None:
    """What has come of a file that nobody wants any more is deleted."""
    ends = Ends(root, _bytes(3 * BLOCK))
    ends.incoming.receive(0, ends.data[:BLOCK])
    ends.incoming.discard()
    assert list(ends.receiver.incoming.iterdir()) == []


def test_same_file_on_two_ways(root: Path) -> None:
    """Two jobs that wait for files with the same contents, such as their adapter_config.json, both get it, also where each has come
    half the way when the other one finishes."""
    ends = Ends(root, _bytes(2 * BLOCK))
    first, second = ends.begin(), ends.begin()
    blocks = [(number, ends.data[number * BLOCK : (number + 1) * BLOCK]) for number in (0, 1)]
    second.receive(*blocks[1])
    assert not first.receive(*blocks[0])
    assert first.receive(*blocks[1])
    second.receive(*blocks[0])
    assert second.tick()
    assert ends.arrived()


# the store


@pytest.mark.parametrize(
    "name",
    ["", "..", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 65, "g" * 64, "a" * 63 + "\n", "a" * 64 + "\n", "/" + "a" * 63, "٠" * 64],
)
def test_name_that_is_no_sha256(name: str, root: Path) -> None:
    """A name from outside reaches no file but those of the store: every way to use it refuses it."""
    store = FileStore(root)
    request = FileRequest(BLOCK, [0])
    with pytest.raises(Refused, match="is no sha256"):
        store.path(name)
    with pytest.raises(Refused, match="is no sha256"):
        store.has(name)
    with pytest.raises(Refused, match="is no sha256"):
        list(store.read_blocks(name, request))
    with pytest.raises(DatasetChecksum):
        store.put(b"", name)
    assert sorted(root.rglob("*")) == [root / "incoming", root / "sha256"]


def test_file_that_is_not_here_has_no_blocks(root: Path) -> None:
    """A request for an unknown file, or for blocks beyond its end, is answered with nothing."""
    store = FileStore(root)
    assert list(store.read_blocks(EMPTY, FileRequest(BLOCK, [0]))) == []
    sha256 = _keep(store, b"x" * (BLOCK + 1))
    assert list(store.read_blocks(sha256, FileRequest(BLOCK, [2, 1, 9, 1]))) == [(1, b"x"), (1, b"x")]


def test_file_that_is_not_the_named_one(root: Path) -> None:
    """A small file with another digest is refused and not kept."""
    store = FileStore(root)
    with pytest.raises(DatasetChecksum, match="the inline file has sha256"):
        store.put(b"x", EMPTY)
    assert not store.has(EMPTY)


def test_adopted_file_stays_what_it_was(root: Path) -> None:
    """A finished file is in the store under its digest, and replacing the original leaves the stored one alone."""
    store, file = FileStore(root / "store"), root / "result.json"
    write_file(file, b"first")
    sha256 = store.adopt(file)
    assert sha256 == hashlib.sha256(b"first").hexdigest() == store.adopt(file)
    write_file(file, b"second")
    assert store.path(sha256).read_bytes() == b"first"


def test_store_is_private(root: Path) -> None:
    """Only the owner can look into the directories of a new store: datasets are nobody else's."""
    store = FileStore(root / "store")
    assert {d.stat().st_mode & 0o777 for d in (store.incoming, store.path(EMPTY).parent)} == {0o700}


def test_unused_files_go_first(root: Path) -> None:
    """Over the limit the files go that were asked for longest ago, never one that is needed, and no more than necessary."""
    store = FileStore(root)
    files = [_keep(store, _bytes(100, seed)) for seed in range(5)]
    for age, sha256 in enumerate(reversed(files)):
        os.utime(store.path(sha256), (1_000_000_000 - age, 1_000_000_000 - age))
    assert store.has(files[1])  # being asked for counts as use

    def left() -> list[int]:
        return [number for number, sha256 in enumerate(files) if store.path(sha256).exists()]

    store.remove_unused(500, set())
    assert left() == [0, 1, 2, 3, 4]
    store.remove_unused(399, {files[0]})
    assert left() == [0, 1, 4]
    store.remove_unused(200, {files[0]})
    assert left() == [0, 1]
    store.remove_unused(0, {files[0], files[1]})
    assert left() == [0, 1]
    store.remove_unused(0, set())
    assert left() == []


# files


def test_link_over_an_existing_link(root: Path) -> None:
    """The same file linked twice to one place is there once, and nothing else is."""
    source, place = root / "source", root / "place" / "file"
    source.write_bytes(b"contents")
    place.parent.mkdir()
    for _ in range(2):
        link_file(place, source)
        assert place.samefile(source)
        assert list(place.parent.iterdir()) == [place]


def test_link_over_another_file(root: Path) -> None:
    """What stood there is replaced, also after a writer that was killed left its part behind."""
    source, place = root / "source", root / "file"
    source.write_bytes(b"new")
    place.write_bytes(b"old")
    (root / ".file.part").write_bytes(b"torn")
    link_file(place, source)
    assert place.read_bytes() == b"new"
    assert sorted(root.iterdir()) == [place, source]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    with disks.small_disk(tmp_path / "disk", 1) as place:
        yield place


def _fill(place: Path, leave: int = 0) -> Path:
    """Take all room but `leave` bytes."""
    filler = place / "filler"
    filler.write_bytes(b"\0" * (shutil.disk_usage(place).free - leave))
    assert shutil.disk_usage(place).free == leave
    return filler


def test_full_disk_loses_no_block(disk: Path, tmp_path: Path) -> None:
    """A block that finds no room raises DiskFull; with room again the transfer goes on, also over a restart, from the blocks it had."""
    ends = Ends(tmp_path, _bytes(6 * BLOCK_BYTES), block_bytes=BLOCK_BYTES)
    ends.receiver = FileStore(disk / "files")
    ends.begin().tick()
    answers = ends.answers()
    for number, block in answers[:2]:
        assert not ends.incoming.receive(number, block)
    filler = _fill(disk, leave=BLOCK_BYTES // 2)
    for number, block in answers[2:4]:
        with pytest.raises(DiskFull, match="no space left"):
            ends.incoming.receive(number, block)
    assert ends.incoming.missing_blocks == 4
    assert ends.begin().missing_blocks == 4
    filler.unlink()
    assert ends.exchange() == [2, 3, 4, 5]
    assert ends.arrived()


def test_full_disk_keeps_no_half_file(disk: Path, tmp_path: Path) -> None:
    """A file that finds no room is not there at all, the one that it would have replaced is, and nothing is left beside it."""
    store = FileStore(disk / "files")
    kept = _keep(store, b"kept")
    source = tmp_path / "source"  # of another file system, so it is copied
    source.write_bytes(_bytes(64 * 1024))
    write_directory(disk / "adapter", {"config": b"old"})
    filler = _fill(disk, leave=16 * 1024)
    before = sorted(disk.rglob("*"))
    with pytest.raises(DiskFull, match="65,536 bytes are needed"):
        _keep(store, _bytes(64 * 1024))
    with pytest.raises(DiskFull):
        store.adopt(source)
    with pytest.raises(DiskFull):
        link_file(store.path(kept), source)
    with pytest.raises(DiskFull):
        write_file(store.path(kept), source.read_bytes())
    with pytest.raises(DiskFull):
        write_directory(disk / "adapter", {"config": b"new", "weights": source.read_bytes()})
    assert sorted(disk.rglob("*")) == before
    assert store.path(kept).read_bytes() == b"kept"
    assert (disk / "adapter" / "config").read_bytes() == b"old"
    filler.unlink()
    assert store.path(store.adopt(source)).read_bytes() == source.read_bytes()
    write_directory(disk / "adapter", {"weights": b"new"})
    assert [f.name for f in (disk / "adapter").iterdir()] == ["weights"]


def test_file_of_another_file_system_is_copied(disk: Path, tmp_path: Path) -> None:
    """Where no link can be made the contents are copied, and the copy is whole."""
    source = tmp_path / "source"
    source.write_bytes(_bytes(1000))
    link_file(disk / "file", source)
    assert not (disk / "file").samefile(source)
    assert (disk / "file").read_bytes() == source.read_bytes()
    assert list(disk.iterdir()) == [disk / "file"]


def test_what_an_end_has_left_is_swept(root: Path) -> None:
    """Parts that nobody awaits, and those of a file that is there already, go; one that is awaited stays, to be gone on with."""
    store, awaited, there = FileStore(root), "a" * 64, hashlib.sha256(b"x").hexdigest()
    store.put(b"x", there)
    for name in (f"{awaited}.65536.part", f"{awaited}.65536.map", f"{there}.65536.map", f"{'b' * 64}.65536.part", "upload-1-2"):
        (store.incoming / name).write_bytes(b"")
    store.sweep({awaited, there})
    assert sorted(file.name for file in store.incoming.iterdir()) == [f"{awaited}.65536.map", f"{awaited}.65536.part"]


def test_old_files_that_nobody_needs_go(root: Path) -> None:
    """An upload for which no job came is deleted after a time; one that is needed, or new, stays."""
    store = FileStore(root)
    names = [hashlib.sha256(data).hexdigest() for data in (b"old", b"needed", b"new")]
    for data, name in zip((b"old", b"needed", b"new"), names, strict=True):
        store.put(data, name)
    for name in names[:2]:
        os.utime(store.path(name), (0, 0))
    store.remove_old({names[1]}, 3600.0)
    assert [store.path(name).exists() for name in names] == [False, True, True]
