"""Filling a teacher's cache from a server (`qat.trainers.remote`), many rows at once.

Rows are kept in the order in which they are answered, so that whatever ends the work (Ctrl-C, a server that is gone)
loses no answer; the next `qat teacher` asks for the rest. The text that is evaluated on is asked like any other: no
server gives hidden states, so its KL is over the likeliest tokens and the rest as one.

Before the first row a probe is sent, as text: a server with another tokenizer answers for other tokens. What it finds
likeliest there is remembered, and another model that answers later under the same name is refused.
"""

import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any

from qat.checkpoints.hf import describe
from qat.checkpoints.progress import progress
from qat.errors import ConfigError
from qat.trainers.cached import EVALUATED, TRAINED, Filled, filled, identity, keys_of, missing, settings, stored
from qat.trainers.data import load_blocks
from qat.trainers.job import Job
from qat.trainers.logitcache import Store, Writer
from qat.trainers.packing import Row
from qat.trainers.remote import Remote, Server
from qat.trainers.teacher import PROBE
from qat.training.known import Known

SAME = 0.9  # share of the probe's tokens at which the same model, computing in another order, finds the same likeliest
AHEAD = 2  # requests that wait for each that is under way


def fill_remote(job: Job, tokenizer: Any) -> Filled:
    """Ask the server about every row of the job that is not in its cache yet.

    Raises:
        CheckpointError: another process fills the folder; the server does not answer, or not what was asked.
        ConfigError: the cache is another teacher's; the server's tokenizer is another; a text that only the teacher's
            weights can write.
    """
    begin = time.monotonic()
    assert job.teacher_cache is not None and job.teacher_cache.remote is not None
    remote = job.teacher_cache.remote
    _refuse_written(job)
    store = stored(job, tokenizer)
    wanted = {key: job.texts[key] for key in (TRAINED, *EVALUATED) if key in job.texts}
    texts = {key: load_blocks(config, tokenizer, num_tokens=count) for key, (config, count) in wanted.items()}
    asked = [key for key in texts if key in EVALUATED or job.objective.needs_teacher]
    keys = {key: keys_of(texts[key]) for key in asked}
    rows = {own[row]: texts[key].array()[row] for key, own in keys.items() for row in missing(store, own)}
    server = Server(remote, job.teacher_cache.k, _columns(job, store))
    with store.writing() as writer:
        likely = probed(server, tokenizer, remote)
        _refuse_another(store, likely, remote)
        now = {"vocabulary": server.columns, "texts": settings(job), "computed in": f"{remote.model} on a server"}
        store.header |= {**identity(job, tokenizer), **now, "probe": store.header.get("probe", likely)}
        store.keep_header()
        _ask(server, rows, writer)
    trained = keys.get(TRAINED, [])
    return filled(store, len(trained), len(rows), time.monotonic() - begin)


def _ask(server: Server, rows: dict[bytes, Row], writer: Writer) -> None:
    """All rows, `concurrency` at once; what was answered is kept when it ends early."""
    left = iter(rows.items())
    pool = ThreadPoolExecutor(server.config.concurrency, "teacher")
    running: dict[Future[Known], bytes] = {}
    try:
        with progress("asking the teacher's server", len(rows), "rows") as advance:
            while True:
                for key, row in islice(left, server.config.concurrency * AHEAD - len(running)):
                    running[pool.submit(server.row, row)] = key
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    writer.add(running[done], done.result())
                    del running[done]
                    advance(1)
    finally:
        server.stop()
        pool.shutdown(cancel_futures=True)
        for future, key in running.items():
            if not future.cancelled() and future.exception() is None:
                writer.add(key, future.result())


def probed(server: Server, tokenizer: Any, remote: Remote) -> list[int]:
    """What the server finds likeliest at each token of a text that it splits itself, as the student's tokenizer does.

    Raises:
        ConfigError: it splits it otherwise.
    """
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    own, theirs = server.answer(ids, 1), server.answer(PROBE, 1)
    theirs = theirs[: len(ids)] if remote.ask == "echo" and len(theirs) == len(ids) + 1 else theirs
    other = [place for place, (at, token) in enumerate(zip(theirs, ids, strict=False)) if place and token not in at]
    if len(theirs) != len(ids) or other:
        where = f"{len(theirs)} tokens, not {len(ids)}" if len(theirs) != len(ids) else f"another token {other[0]}"
        raise ConfigError(
            f"{remote.url} splits text otherwise than the student's tokenizer (a probe becomes {where}): "
            f"{remote.model} is not a teacher whose token ids are the student's"
        )
    return [max(at, key=lambda token: at[token]) for at in own[1:]]


def _refuse_another(store: Store, likely: list[int], remote: Remote) -> None:
    before = store.header.get("probe")
    if before is not None and sum(a == b for a, b in zip(before, likely, strict=True)) < SAME * len(likely):
        raise ConfigError(
            f"{remote.model} on {remote.url} is another model than the one that filled {store.folder}: it answers a "
            "probe otherwise. Give another folder: teacher_cache.folder=..."
        )


def _refuse_written(job: Job) -> None:
    for key, (config, _) in job.texts.items():
        if any(part.source == "teacher" for part in config.parts):
            raise ConfigError(
                f"{key}.source: teacher has to be written by the teacher's weights, which a server does not give; "
                "let it write a .jsonl (any client does), and give that as the source"
            )


def _columns(job: Job, store: Store) -> int:
    """Token ids that teacher and student share."""
    sizes = [int(describe(config)[1].get_text_config().vocab_size) for config in (job.model, job.teacher) if config]
    if store.header and store.vocabulary != min(sizes):
        raise ConfigError(
            f"the teacher's cache {store.folder} was filled over {store.vocabulary} logits, and this job's models have "
            f"{min(sizes)} in common; give another folder: teacher_cache.folder=..."
        )
    return min(sizes)
