"""Two drivers on one output_dir in an object store: they hold it, die, freeze, come late, and race for it."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from typing import Any

import pytest

from nemo_ray import object_store, storage
from nemo_ray.errors import ConfigError, NemoRayError
from nemo_ray.train import store_lock
from nemo_ray.train.driver import UNREADABLE, Driver, this_driver
from nemo_ray.train.store_lock import StoreLock, read_holder
from tests.object_store import Fault, ObjectStore, use

LIMIT_S = 60.0
BEAT_S, WATCH_S, SETTLE_S = 0.3, 1.5, 0.4
ELSEWHERE = {"host": "other", "pid_space": "another boot/1"}
HOLDER = """
import sys, time
from dataclasses import replace
from nemo_ray.errors import NemoRayError
from nemo_ray.train.store_lock import StoreLock
url, host, space, *seconds = sys.argv[1:]
lock = StoreLock(url, None, lambda text: None, *map(float, seconds))
lock.me = replace(lock.me, host=host, pid_space=space)
lock.claim()
print(lock.me.token, flush=True)
try:
    while True:
        lock.check()
        time.sleep(0.01)
except NemoRayError as error:
    print(error, flush=True)
"""
Locks = Callable[..., StoreLock]


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with ObjectStore() as store:
        store.create_bucket("bucket")
        yield store


@pytest.fixture
def store(server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    patience_s = object_store.PATIENCE_S
    use(server, monkeypatch, stall_s=server.stall_s)
    monkeypatch.setattr(object_store, "PATIENCE_S", patience_s)  # a lock outlives a store that is away
    monkeypatch.setattr(object_store, "LONGEST_PAUSE_S", 0.05)
    yield server
    server.fail_always(None)
    server.settle()
    object_store._connect.cache_clear()


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """A folder that no other test uses."""
    return f"s3://bucket/{request.node.name}/run"


@pytest.fixture
def locks(store: ObjectStore, url: str) -> Iterator[Locks]:
    """Makes locks of this process on the folder, whose process another cannot see, if so asked."""
    made: list[StoreLock] = []

    def make(
        said: list[str] | None = None,
        *,
        elsewhere: bool = False,
        beat_s: float = BEAT_S,
        watch_s: float = WATCH_S,
    ) -> StoreLock:
        say = (lambda text: None) if said is None else said.append
        lock = StoreLock(url, None, say, beat_s, watch_s, SETTLE_S)
        if elsewhere:
            lock.me = replace(lock.me, **ELSEWHERE)
        made.append(lock)
        return lock

    yield make
    store.fail_always(None)
    for lock in made:
        lock.release()


@pytest.fixture
def frozen(store: ObjectStore, url: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the folder, as if on another machine."""
    seconds = [str(BEAT_S), str(WATCH_S), str(SETTLE_S)]
    arguments = [sys.executable, "-c", HOLDER, url, ELSEWHERE["host"], ELSEWHERE["pid_space"], *seconds]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    watchdog = threading.Timer(LIMIT_S, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None and len(process.stdout.readline()) == 17
        yield process
    finally:
        watchdog.cancel()
        process.kill()
        process.wait(LIMIT_S)


def read(store: ObjectStore, url: str) -> dict[str, Any] | None:
    """What the object says, past the client and the proxy."""
    content = store.objects("bucket").get(url.removeprefix("s3://bucket/") + "/.driver.json")
    return json.loads(content) if content is not None else None


def write(store: ObjectStore, url: str, driver: Driver, beats: int = 1) -> None:
    lock = StoreLock(url, None, print)
    lock.me, lock._num_puts = driver, beats - 1
    store.put("bucket", url.removeprefix("s3://bucket/") + "/.driver.json", lock._content())


def token(store: ObjectStore, url: str) -> str | None:
    facts = read(store, url)
    return facts["token"] if facts is not None else None


def dead() -> Driver:
    """A driver of this machine whose process has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(LIMIT_S)
    return replace(this_driver(None), pid=process.pid)


def wait_until(met: Callable[[], bool], within_s: float = LIMIT_S) -> None:
    until_s = time.monotonic() + within_s
    while not met():
        assert time.monotonic() < until_s
        time.sleep(0.01)


def background(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def assert_refused(lock: StoreLock, url: str, holder: Driver) -> None:
    with pytest.raises(ConfigError) as refusal:
        lock.claim()
    line = str(refusal.value)
    assert "\n" not in line and line.startswith(f"output_dir: another driver is at work in {url}: process ")
    assert f"process {holder.pid} on {holder.host}, since {holder.started_at}; wait for its end" in line
    assert not lock.holds()


# -- a holder that lives --------------------------------------------------------------------------


def test_a_live_holder_is_named_and_nothing_changes(store: ObjectStore, url: str, locks: Locks) -> None:
    holder, said = locks(beat_s=LIMIT_S), list[str]()
    holder.claim()
    wait_until(lambda: read(store, url)["beats"] == 2)  # type: ignore[index]
    late = locks(said)
    with store.recorded() as requests:
        assert_refused(late, url, holder.me)
        late.release()
    assert {request.method for request in requests} == {"HEAD", "GET"}
    assert said == []  # the process can be seen: nothing to wait for
    assert holder.holds() and read_holder(url) == holder.me


def test_a_holder_elsewhere_lives_while_it_beats(store: ObjectStore, url: str, locks: Locks) -> None:
    """Longer than it may stand still, and the first beat tells."""
    holder, said = locks(elsewhere=True), list[str]()
    holder.claim()
    time.sleep(1.5 * WATCH_S)
    began_s = time.monotonic()
    assert_refused(locks(said, watch_s=LIMIT_S), url, holder.me)
    assert time.monotonic() - began_s < LIMIT_S / 2
    holder.check()
    (line,) = said
    assert line.startswith(f"waiting to see whether another driver is alive in {url}: process ")
    assert " on other, since " in line


def test_a_holder_that_could_not_beat_while_the_store_was_away_lives(
    store: ObjectStore, url: str, locks: Locks
) -> None:
    elsewhere = replace(this_driver(None), **ELSEWHERE)
    write(store, url, elsewhere)

    before = len(store.requests)

    def away_and_back() -> None:
        wait_until(lambda: sum(request.method == "GET" for request in store.requests[before:]) > 17)
        store.fail_always("503")
        time.sleep(1.5 * WATCH_S)
        store.fail_always(None)
        time.sleep(0.85 * WATCH_S)
        write(store, url, elsewhere, beats=2)

    thread = background(away_and_back)
    assert_refused(locks(), url, elsewhere)
    thread.join(LIMIT_S)
    assert token(store, url) == elsewhere.token


# -- a holder that is dead, or ends ---------------------------------------------------------------


def test_a_holder_whose_process_is_gone_is_taken_over_at_once(
    store: ObjectStore, url: str, locks: Locks
) -> None:
    write(store, url, dead())
    said = list[str]()
    lock = locks(said, watch_s=LIMIT_S)
    began_s = time.monotonic()
    lock.claim()
    assert time.monotonic() - began_s < LIMIT_S / 2 and said == []
    assert lock.holds() and token(store, url) == lock.me.token


@pytest.mark.parametrize("readable", [True, False])
def test_a_holder_elsewhere_that_stands_still_is_taken_over(
    store: ObjectStore, url: str, locks: Locks, readable: bool
) -> None:
    if readable:
        write(store, url, replace(this_driver(None), **ELSEWHERE))
    else:
        store.put("bucket", url.removeprefix("s3://bucket/") + "/.driver.json", b"[]")
        assert read_holder(url) == UNREADABLE
    lock = locks()
    began_s = time.monotonic()
    lock.claim()
    assert time.monotonic() - began_s >= WATCH_S + SETTLE_S
    assert lock.holds() and read_holder(url) == lock.me


def test_a_holder_elsewhere_that_ends_meanwhile_leaves_the_folder_free(
    store: ObjectStore, url: str, locks: Locks
) -> None:
    holder, lock = locks(elsewhere=True, beat_s=WATCH_S), locks()
    holder.claim()
    wait_until(lambda: read(store, url)["beats"] == 2)  # type: ignore[index]
    threading.Timer(WATCH_S / 3, holder.release).start()
    lock.claim()
    assert lock.holds() and not holder.holds() and token(store, url) == lock.me.token


# -- one at a time --------------------------------------------------------------------------------


def race(rounds: list[str], seed: int, barrier: Barrier, wins: Any) -> None:
    generator, put = random.Random(seed), storage.publish_bytes

    def put_late(path: str, data: bytes) -> None:
        time.sleep(generator.uniform(0, SETTLE_S / 2))
        put(path, data)

    storage.publish_bytes = put_late  # type: ignore[assignment]  # in a process of its own
    made = [StoreLock(url, None, lambda text: None, LIMIT_S, WATCH_S, SETTLE_S) for url in rounds]
    for url, lock in zip(rounds, made, strict=True):
        read_holder(url)  # a connection is there
        barrier.wait(LIMIT_S)
        time.sleep(generator.uniform(0, 0.06))
        try:
            lock.claim()
        except ConfigError:
            wins.put((url, None))
        else:
            wins.put((url, lock.me.token))
    barrier.wait(LIMIT_S)  # all are alive until the last is done


def test_of_several_takers_exactly_one_wins(store: ObjectStore, url: str) -> None:
    num_rounds, num_takers = 8, 3
    rounds = [f"{url}/{number}" for number in range(num_rounds)]
    gone = dead()
    for folder in rounds[::2]:  # the others are free
        write(store, folder, gone)
    context = multiprocessing.get_context("spawn")  # a fork would not have the client's threads
    barrier, wins = context.Barrier(num_takers), context.Queue()
    takers = [context.Process(target=race, args=(rounds, seed, barrier, wins)) for seed in range(num_takers)]
    with store.recorded() as requests:
        for taker in takers:
            taker.start()
        told = [wins.get(timeout=LIMIT_S) for _ in range(num_rounds * num_takers)]
        for taker in takers:
            taker.join(LIMIT_S)
            assert taker.exitcode == 0
    won = [(folder, winner) for folder, winner in told if winner is not None]
    assert sorted(folder for folder, _ in won) == sorted(rounds)
    for folder, winner in won:
        assert token(store, folder) == winner
    puts = Counter(request.path for request in requests if request.method == "PUT")
    assert sum(count > 2 for count in puts.values()) >= num_rounds / 3  # contested: the winner makes two


def test_a_claim_that_comes_late_waits_until_the_holder_it_replaced_has_noticed(
    store: ObjectStore, url: str, locks: Locks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its put was on the way when the other one settled."""
    first, late = locks(beat_s=3 * SETTLE_S), locks()
    put, came = storage.publish_bytes, list[bytes]()

    def put_late(path: str, data: bytes) -> None:
        came.append(data)
        if len(came) == 1:
            first.claim()
            wait_until(lambda: read(store, url)["beats"] == 2)  # type: ignore[index]
        put(path, data)

    monkeypatch.setattr(storage, "publish_bytes", put_late)
    late.claim()
    assert late.holds() and not first.holds()
    with pytest.raises(NemoRayError, match="taken over by another driver"):
        first.check()


def test_a_store_that_is_too_slow_for_claims_is_told_in_one_line(
    store: ObjectStore, url: str, locks: Locks, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = storage.publish_bytes
    monkeypatch.setattr(storage, "publish_bytes", lambda *given: (time.sleep(1.2 * SETTLE_S), put(*given)))
    lock = locks()
    with pytest.raises(ConfigError, match=rf"^output_dir: {url} cannot be held: the store took 0\.\d s to "):
        lock.claim()
    assert not lock.holds()
    lock.release()
    assert read(store, url) is None


# -- frozen, and taken for dead -------------------------------------------------------------------


def test_a_frozen_holder_that_wakes_up_notices_and_leaves_the_new_one_alone(
    store: ObjectStore, url: str, locks: Locks, frozen: subprocess.Popen[str]
) -> None:
    frozen.send_signal(signal.SIGSTOP)
    lock = locks()
    lock.claim()
    frozen.send_signal(signal.SIGCONT)
    assert frozen.stdout is not None
    line = frozen.stdout.readline()
    assert line.startswith(f"output_dir: {url} was taken over by another driver (process {os.getpid()} on ")
    frozen.wait(LIMIT_S)
    time.sleep(2 * BEAT_S)
    lock.check()
    assert token(store, url) == lock.me.token


@pytest.mark.parametrize("frozen_after", ["look", "freshness"])
def test_a_beat_that_was_frozen_in_between(
    store: ObjectStore, url: str, locks: Locks, monkeypatch: pytest.MonkeyPatch, frozen_after: str
) -> None:
    """After its look it looks again, and has lost; in its very put it cannot, and comes over the new holder,
    who loses, unless its own put was on the way: then the old one does."""
    old, new = locks(elsewhere=True), locks()
    old.claim()
    reached, wakes = threading.Event(), threading.Event()
    name = "_read" if frozen_after == "look" else "_put_once"
    work = getattr(store_lock, name)

    def freeze(*given: Any) -> Any:
        found = work(*given) if frozen_after == "look" else None
        if threading.current_thread() is old._thread and not wakes.is_set():
            reached.set()
            assert wakes.wait(LIMIT_S)
        return found if frozen_after == "look" else work(*given)

    monkeypatch.setattr(store_lock, name, freeze)
    assert reached.wait(LIMIT_S)
    new.claim()
    wakes.set()
    wait_until(lambda: old.holds() != new.holds())
    loses, keeps = (old, new) if new.holds() else (new, old)
    assert loses is old or frozen_after == "freshness"
    time.sleep(2 * BEAT_S)
    keeps.check()
    with pytest.raises(NemoRayError, match="taken over by another driver"):
        loses.check()
    assert token(store, url) == keeps.me.token


def test_a_beat_that_failed_is_not_put_again_without_a_look(
    store: ObjectStore, url: str, locks: Locks
) -> None:
    """The folder may have been taken over meanwhile."""
    lock = locks()
    lock.claim()
    store.fail_always("503", method="PUT")
    store.settle()
    before = len(store.requests)
    wait_until(lambda: any(request.fault for request in store.requests[before:]))  # a beat is past its look
    other = replace(this_driver(None), **ELSEWHERE)
    write(store, url, other)
    store.fail_always(None)
    wait_until(lambda: not lock.holds(), within_s=10 * BEAT_S)
    assert token(store, url) == other.token


@pytest.mark.parametrize("submission_id", [None, "raysubmit_1"])
def test_a_look_beside_a_put_is_not_half_of_each(
    store: ObjectStore, url: str, monkeypatch: pytest.MonkeyPatch, submission_id: str | None
) -> None:
    """A client asks for the size first: between its two requests the object changes."""
    write(store, url, this_driver("raysubmit"))
    after = this_driver(submission_id)  # a shorter one, and a longer one

    def choose(method: str, path: str) -> None:
        if method == "GET":
            write(store, url, after)

    monkeypatch.setattr(store, "_choose", choose)
    assert read_holder(url) == after


def test_a_holder_whose_object_is_gone_has_lost(store: ObjectStore, url: str, locks: Locks) -> None:
    lock = locks()
    with pytest.raises(NemoRayError, match="is gone"):
        lock.check()
    lock.claim()
    lock.check()
    wait_until(lambda: read(store, url)["beats"] > 2)  # type: ignore[index]
    storage.remove(lock.path)
    wait_until(lambda: not lock.holds() or read(store, url) is not None)
    if lock.holds():  # a beat was under way
        storage.remove(lock.path)
        wait_until(lambda: not lock.holds())
    with pytest.raises(NemoRayError, match=rf"^output_dir: {url}/\.driver\.json is gone: another driver"):
        lock.check()
    time.sleep(2 * BEAT_S)
    assert read(store, url) is None


# -- kept and given up ----------------------------------------------------------------------------


def test_what_the_driver_asks_often_makes_no_request(store: ObjectStore, url: str, locks: Locks) -> None:
    lock = locks(beat_s=LIMIT_S)
    lock.claim()
    wait_until(lambda: read(store, url)["beats"] == 2)  # type: ignore[index]
    with store.recorded() as requests:
        for _ in range(1000):
            lock.check()
            assert lock.holds()
    assert requests == []


def test_a_store_that_fails_and_goes_away_does_not_take_the_folder(
    store: ObjectStore, url: str, locks: Locks
) -> None:
    lock = locks()
    lock.claim()
    store.fail_some(0.4, seed=1, faults=("500", "503", "reset", "lost reply"))
    until_s = time.monotonic() + 2 * WATCH_S
    before = read(store, url)
    while time.monotonic() < until_s:
        lock.check()
        time.sleep(0.01)
    assert before is not None and read(store, url)["beats"] >= before["beats"] + 3  # type: ignore[index]
    store.fail_always("reset")
    store.settle()
    before = read(store, url)
    until_s = time.monotonic() + 2 * WATCH_S
    while time.monotonic() < until_s:
        lock.check()
        time.sleep(0.01)
    assert read(store, url) == before and lock.holds()
    store.fail_always(None)
    wait_until(lambda: read(store, url) != before)
    assert lock.holds() and token(store, url) == lock.me.token


def test_a_holder_that_was_replaced_while_the_store_was_away_for_it_notices_on_its_return(
    store: ObjectStore, url: str, locks: Locks
) -> None:
    lock = locks()
    lock.claim()
    store.fail_always("reset")
    store.settle()
    other = replace(this_driver(None), **ELSEWHERE)
    write(store, url, other)
    time.sleep(2 * BEAT_S)
    lock.check()
    store.fail_always(None)
    wait_until(lambda: not lock.holds())
    lock.release()
    assert token(store, url) == other.token


def test_release_removes_what_is_ours_only(store: ObjectStore, url: str, locks: Locks) -> None:
    lock, late, next_one = locks(), locks(), locks()
    lock.claim()
    with pytest.raises(ConfigError):
        late.claim()
    late.release()
    assert token(store, url) == lock.me.token
    lock.release()
    assert read(store, url) is None and not lock.holds()
    next_one.claim()
    lock.release()
    assert token(store, url) == next_one.me.token


def test_release_leaves_no_beat_behind(
    store: ObjectStore, url: str, locks: Locks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A put that is under way would bring the object back."""
    put, begun, done = store_lock._put_once, threading.Event(), threading.Event()

    def slow(path: str, data: bytes) -> None:
        begun.set()
        time.sleep(BEAT_S / 2)
        put(path, data)
        done.set()

    monkeypatch.setattr(store_lock, "_put_once", slow)
    lock = locks()
    lock.claim()
    assert begun.wait(LIMIT_S)
    lock.release()
    assert done.wait(LIMIT_S) and read(store, url) is None


@pytest.mark.parametrize("faults", [("reset",), ("lost reply", "reset"), ("503", "500")], ids=str)
def test_release_is_tried_again(
    store: ObjectStore, url: str, locks: Locks, faults: tuple[Fault, ...]
) -> None:
    """What stays behind lets the next driver, on another machine, wait for the beats of one that is gone."""
    for method in ("GET", "DELETE"):
        lock = locks(beat_s=LIMIT_S)
        lock.claim()
        wait_until(lambda: read(store, url)["beats"] == 2)  # type: ignore[index]
        store.settle()
        store.fail_next(*faults, method=method)
        lock.release()
        store.fail_always(None)
        assert read(store, url) is None


def test_release_does_not_wait_for_a_store_that_is_away(store: ObjectStore, url: str, locks: Locks) -> None:
    lock = locks(beat_s=LIMIT_S)
    lock.claim()
    wait_until(lambda: read(store, url)["beats"] == 2)  # type: ignore[index]
    store.settle()
    store.fail_always("reset")
    began_s = time.monotonic()
    lock.release()
    assert time.monotonic() - began_s < object_store.PATIENCE_S / 10


# -- a store that refuses -------------------------------------------------------------------------


def test_a_missing_bucket_and_denied_access_are_told_in_one_line(
    store: ObjectStore, url: str, locks: Locks
) -> None:
    elsewhere = StoreLock("s3://nowhere/run", None, print, BEAT_S, WATCH_S, SETTLE_S)
    with pytest.raises(ConfigError, match="there is no bucket nowhere; create it") as told:
        elsewhere.claim()
    elsewhere.release()
    assert str(told.value).startswith("output_dir: s3://nowhere/run") and "\n" not in str(told.value)
    for method in (None, "PUT"):
        store.fail_always("403", method=method)
        lock = locks()
        with pytest.raises(ConfigError, match="access denied; give these credentials") as told:
            lock.claim()
        assert str(told.value).startswith(f"output_dir: {url}") and "\n" not in str(told.value)
        assert not lock.holds()


def test_credentials_in_the_url_are_not_told(store: ObjectStore) -> None:
    lock = StoreLock("s3://name:secret@bucket/run", None, print, BEAT_S, WATCH_S, SETTLE_S)
    for ask in (lock.claim, lock.check):
        with pytest.raises(NemoRayError, match="^output_dir: ") as told:
            ask()
        assert "secret" not in str(told.value)
