"""The file behind the paged cache: warm after a restart, never wrong, whatever happens to it."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gr_kernels.cache import tier
from gr_kernels.cache.paged import PagedCache

from .cache_client import Client, audit, content_of

CAPACITY = 32 * 1024
FILE_BYTES = 4096 + 8 * 65536
"""Room for about 400 blocks of 4 tokens; memory has room for 32."""


def open_cache(path: Path, file_bytes: int | str = FILE_BYTES) -> PagedCache:
    return PagedCache(CAPACITY, file=str(path), file_bytes=file_bytes)


def client_of(cache: PagedCache, name: bytes = b"model/1") -> Client:
    return Client(cache, name, 4, 256)


def items_of(user: int) -> list[int]:
    return [user, *range(29)]


def fill(path: Path, users: int = 20) -> None:
    cache = open_cache(path)
    client = client_of(cache)
    for user in range(users):
        client.serve(b"", items_of(user), owner=f"user {user}")
    cache.close()


def reused(path: Path, users: int = 20) -> int:
    """Opens the file, asks for every user, checks what is reused; all tokens that were."""
    cache = open_cache(path)
    client = client_of(cache)
    found = 0
    for user in range(users):
        found += client.serve(b"", items_of(user), owner=f"user {user}")
        audit(cache)
    assert found == cache.statistics().hits
    cache.close()
    return found


def test_evicted_blocks_come_back(tmp_path: Path) -> None:
    cache = open_cache(tmp_path / "kv")
    client = client_of(cache)
    for user in range(20):
        assert client.serve(b"", items_of(user)) == 0
    for user in range(20):
        assert client.serve(b"", items_of(user)) == 30
    told = cache.statistics()
    assert told.evictions > 0
    assert told.bytes <= CAPACITY
    assert told.tiers["file"].hits > 400
    assert told.tiers["file"].entries > 100
    assert told.tiers["file"].bytes <= told.tiers["file"].capacity_bytes <= FILE_BYTES
    audit(cache)


def test_a_restart_is_warm(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    fill(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size <= FILE_BYTES
    assert reused(path) == 20 * 30
    assert reused(path) == 20 * 30


def test_a_closed_space_is_warm_when_it_is_opened_again(tmp_path: Path) -> None:
    cache = open_cache(tmp_path / "kv")
    client = client_of(cache)
    client.serve(b"", items_of(1), owner="ada")
    client.space.close()
    assert cache.statistics().bytes == 0
    assert client_of(cache, b"model/2").serve(b"", items_of(1)) == 0
    assert client_of(cache).serve(b"", items_of(1)) == 30
    audit(cache)


def test_a_new_version_never_reads_old_state_and_takes_its_room(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    fill(path, 35)
    cache = open_cache(path)
    client = client_of(cache, b"model/2")
    for user in range(35):
        assert client.serve(b"", items_of(user)) == 0
    assert sum(client.serve(b"", items_of(user)) for user in range(35)) == 35 * 30
    audit(cache)
    cache.close()


def test_a_model_that_is_loaded_keeps_what_the_file_has_of_it(tmp_path: Path) -> None:
    """Though others are asked first, and need all the room that nobody uses."""
    path = tmp_path / "kv"
    found = {}
    for loaded in (True, False):
        fill(path, 10)
        cache = open_cache(path)
        mine = client_of(cache) if loaded else None
        other = client_of(cache, b"other")
        for user in range(36):
            other.serve(b"", items_of(user))
        mine = mine or client_of(cache)
        found[loaded] = sum(mine.serve(b"", items_of(user)) for user in range(10))
        audit(cache)
        cache.clear()
        cache.close()
    assert found[True] > found[False]


def test_a_width_that_changed_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    fill(path, 2)
    cache = open_cache(path)
    client = client_of(cache)
    wide = np.zeros((5, 7), np.uint8)
    lease = client.space.acquire(b"", wide, 5)
    assert lease is not None
    assert lease.reused == 0
    lease.release()
    audit(cache)
    client.space.close()
    audit(cache)
    cache.close()


def test_a_partly_filled_block_grows_across_restarts(tmp_path: Path) -> None:
    for tokens in range(1, 30):
        cache = open_cache(tmp_path / "kv")
        assert client_of(cache).serve(b"", items_of(1)[:tokens], "ada") == tokens - 1
        audit(cache)
        cache.close()


def test_a_dropped_owner_is_dropped_from_the_file(tmp_path: Path) -> None:
    """Its bytes too; also after a restart, and for models that are not loaded."""
    path = tmp_path / "kv"
    fill(path)
    truth = client_of(PagedCache(CAPACITY)).truth(b"", content_of(items_of(3)))[-1]
    assert truth in path.read_bytes()
    cache = open_cache(path)
    assert cache.evict("user 3") == 8
    assert cache.evict("user 3") == 0
    audit(cache)
    cache.close()
    assert truth not in path.read_bytes()
    assert reused(path) == 19 * 30
    cache = open_cache(path)
    cache.clear()
    cache.close()
    assert reused(path) == 0


def test_who_shares_a_block_is_known_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    cache = open_cache(path)
    client = client_of(cache)
    client.serve(b"", items_of(1), owner="ada")
    client.serve(b"", items_of(1)[:12], owner="ada")
    client.serve(b"", items_of(1)[:12], owner="bob")
    client.serve(b"", items_of(2))
    cache.close()
    cache = open_cache(path)
    assert cache.evict("ada") == 8 - 3
    assert client_of(cache).serve(b"", items_of(1)[:12], owner="bob") == 12
    cache.close()
    cache = open_cache(path)
    assert cache.evict("bob") == 3, "it is nobody else's any more"
    assert client_of(cache).serve(b"", items_of(2)) == 30
    assert b"ada" not in path.read_bytes(), "names of users are not kept"


# ── Damage ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(6))
def test_flipped_bits_lose_blocks_and_nothing_else(tmp_path: Path, seed: int) -> None:
    path, rng = tmp_path / "kv", random.Random(seed)
    fill(path)
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 5, 40])):
        place = rng.choice([rng.randrange(8, len(data)), rng.randrange(8, 16 * 1024)])
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    reused(path)
    assert reused(path) == 20 * 30, "what was lost was computed and kept again"


def test_each_part_of_a_block_is_checked(tmp_path: Path) -> None:
    """A byte in each piece of the file, one after another: never a wrong token."""
    path = tmp_path / "kv"
    fill(path, 1)
    intact = path.read_bytes()
    used = len(intact.rstrip(b"\0"))
    whole = reused(path, 1)
    lost = 0
    for place in range(8, used, 37):
        data = bytearray(intact)
        data[place] ^= 0x10
        path.write_bytes(data)
        lost += reused(path, 1) < whole
    assert lost > used // 37 // 2, "most of the file is blocks"


@pytest.mark.parametrize("size", [0, 5, 100, 4096, 5000, 9000, 20_000, 70_000, 200_000])
def test_a_truncated_file(tmp_path: Path, size: int) -> None:
    path = tmp_path / "kv"
    fill(path)
    os.truncate(path, size)
    assert reused(path) < 20 * 30
    assert reused(path) == 20 * 30


def test_a_file_truncated_while_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    cache = open_cache(path)
    client = client_of(cache)
    for user in range(20):
        client.serve(b"", items_of(user))
    os.truncate(path, 20_000)
    for _ in range(2):
        for user in range(20):
            client.serve(b"", items_of(user))
            audit(cache)
    cache.close()


def test_blocks_damaged_while_the_file_is_used(tmp_path: Path) -> None:
    path, rng = tmp_path / "kv", random.Random(1)
    cache = open_cache(path)
    client = client_of(cache)
    for user in range(200):
        client.serve(b"", items_of(user % 20))
        with path.open("r+b") as file:
            file.seek(rng.randrange(4096, 300_000))
            file.write(rng.randbytes(50))
        audit(cache)
    assert cache.statistics().tiers["file"].hits > 0
    cache.close()


def test_blocks_swapped_in_the_file(tmp_path: Path) -> None:
    """A block that is whole but in another's place is not that other."""
    path = tmp_path / "kv"
    fill(path)
    data = path.read_bytes()
    slot = 256 + 4 * 3 + 4 * 256
    slot = -(-slot // 512) * 512
    first = 4096 + 4096
    one, other = data[first : first + slot], data[first + slot : first + 2 * slot]
    assert one[:8] == other[:8] == b"GRKVSLOT"
    path.write_bytes(data[:first] + other + one + data[first + 2 * slot :])
    assert reused(path) < 20 * 30


@pytest.mark.parametrize(("offset", "value"), [(8, 2), (12, 2)])
def test_another_version_or_byte_order_is_not_read(
    tmp_path: Path, offset: int, value: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Even if all checksums were right."""
    path = tmp_path / "kv"
    fill(path)
    data = bytearray(path.read_bytes())
    data[offset] = value
    header = bytes(data[: tier._FILE.size])
    data[: len(header) + 16] = tier._seal(header, b"")
    path.write_bytes(data)
    assert reused(path) == 0
    assert "the cache starts empty" in caplog.text


def test_another_size_starts_empty(tmp_path: Path) -> None:
    fill(tmp_path / "kv")
    cache = open_cache(tmp_path / "kv", "1MiB")
    assert client_of(cache).serve(b"", items_of(1)) == 0
    assert (tmp_path / "kv").stat().st_size <= 1 << 20


KILLED = """
import sys
sys.path.insert(0, {folder!r})
from cache_client import Client
from gr_kernels.cache.paged import PagedCache
cache = PagedCache({capacity}, file=sys.argv[1], file_bytes={size})
client = Client(cache, b"model/1", 4, 256)
print("ready", flush=True)
for turn in range(10**9):
    user = turn * 7 % 50
    client.serve(b"", [user, *range(5 + turn % 25)], owner=f"user {{user}}")
    if turn % 90 == 0:
        cache.evict(f"user {{user}}")
"""


def test_a_process_killed_while_it_writes(tmp_path: Path) -> None:
    path, rng = tmp_path / "kv", random.Random(0)
    code = KILLED.format(folder=str(Path(__file__).parent), capacity=CAPACITY, size=FILE_BYTES)
    found = 0
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05 + rng.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        cache = open_cache(path)
        client = client_of(cache)
        found += sum(client.serve(b"", items_of(user)) for user in range(50))
        audit(cache)
        cache.close()
    assert found > 1_000, "what was complete is used"


def test_a_full_disk(tmp_path: Path) -> None:
    """Played by a limit of the system on the size of files: what does not fit is not kept."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from cache_client import Client, audit
from gr_kernels.cache.paged import PagedCache
cache = PagedCache({CAPACITY}, file=sys.argv[1], file_bytes={FILE_BYTES})
client = Client(cache, b"model/1", 4, 256)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for turn in range(100):
    client.serve(b"", [turn % 20, *range(29)])
    audit(cache)
print(cache.statistics().tiers["file"].entries)
cache.close()
"""
    command = [sys.executable, "-c", code, str(tmp_path / "kv")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0 < int(result.stdout) < 100
    assert result.stderr.count("blocks are lost: [Errno 27] File too large") == 1


# ── Whose file it is ──────────────────────────────────────────────────────────────────────────


def test_one_process_at_a_time(tmp_path: Path) -> None:
    cache = open_cache(tmp_path / "kv")
    with pytest.raises(ValueError, match=r"kv is in use by another process; give each process"):
        open_cache(tmp_path / "kv")
    cache.close()
    open_cache(tmp_path / "kv").close()


def test_a_file_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "diary.txt"
    path.write_bytes(b"Dear diary, " * 1000)
    with pytest.raises(ValueError, match=r"diary.txt is something else; name another place"):
        open_cache(path)
    assert path.read_bytes() == b"Dear diary, " * 1000


def test_a_file_that_others_may_read_is_closed_to_them(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    fill(path)
    path.chmod(0o644)
    reused(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_places_that_are_no_file(tmp_path: Path) -> None:
    fill(tmp_path / "kv")
    (tmp_path / "link").symlink_to(tmp_path / "kv")
    os.mkfifo(tmp_path / "pipe")
    for name, problem in (
        ("nowhere/kv", "expected a file in a folder that exists"),
        ("", "Is a directory"),
        ("link", "expected a file"),
        ("pipe", "is not a regular file"),
    ):
        with pytest.raises(ValueError, match=problem):
            open_cache(tmp_path / name)


def test_a_block_larger_than_the_file_stays_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "kv"
    cache = PagedCache(1 << 20, file=str(path), file_bytes=4096 + 65536)
    small = client_of(cache)
    small.serve(b"", items_of(1))
    small.space.close()
    client = Client(cache, b"m", 4, 20_000)
    for user in range(40):
        client.serve(b"", items_of(user)[:8])
    audit(cache)
    assert "raise file_bytes" in caplog.text
    assert cache.statistics().tiers["file"].entries == 8, "those of others stay"
    assert client.serve(b"", items_of(39)[:8]) == 8
    assert client_of(cache).serve(b"", items_of(1)) == 30
    cache.close()


def test_files_are_not_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        fill(tmp_path / "kv", 2)
        (tmp_path / "x").write_text("something else altogether, and longer than a header" * 9)
        with pytest.raises(ValueError, match="is something else"):
            open_cache(tmp_path / "x")
    assert len(os.listdir("/proc/self/fd")) == before
