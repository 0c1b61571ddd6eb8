"""Text written by the teacher itself, for distillation without any data set.

Plain text is the recipe of LLM-QAT (Liu et al., 2023, section 3.1): a random first token, the next few greedy, so that
the start settles on something the model finds likely, and the rest sampled from the teacher's own distribution. A chat
begins as the model's template begins one; the model writes the user's turn too (Xu et al., "Magpie", 2024), then, after
what the template puts between them, its answer. Only what it wrote is learnt.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from qat.config import Strict
from qat.errors import DataError
from qat.trainers.memory import free_bytes
from qat.trainers.packing import evaluating
from qat.trainers.rowcache import Rows, apart, fast_bf16, in_bf16, rows_that_fit
from qat.trainers.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_ON_CPU, ROWS_ON_GPU = 96, 384  # documents at a time, unless the settings say how many
CROWDED = 0.75  # share of rows at work below which the others are taken out, once no document begins any more
QUESTION = "qat probe of a question"  # stands in for a user's turn, to see what the template puts around it


class Generate(Strict):
    """How the teacher writes its own text (`source: teacher`).

    Attributes:
        temperature: of sampling; 1 is the teacher's own distribution.
        greedy_tokens: likeliest tokens after the random one that a plain text begins with.
        tokens: how many it writes; null writes what the job reads.
        batch: documents at a time; null: 96 on CPUs, on GPUs 384 or what fits. Another batch is another text.
        chats: share of documents that are chats: the template's opening, then the teacher's question and answer.
        precision: auto is BF16 on GPUs and on CPUs with BF16 units (AMX, AVX-512 BF16), else the teacher's own.
    """

    temperature: float = Field(default=1.0, ge=0.01, le=100)
    greedy_tokens: int = Field(default=4, ge=0)
    tokens: int | None = Field(default=None, ge=1)
    batch: int | None = Field(default=None, ge=1)
    chats: float = Field(default=0.0, ge=0, le=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"


class Template(NamedTuple):
    """What a chat template puts around one question: the ids `before` it, and `after` it up to the answer. The first of
    `after` is what ends the user's turn."""

    before: list[int]
    after: list[int]


@dataclass
class _Document:
    """A document being written.

    Attributes:
        number: in the order in which documents begin, and are given.
        ids, learn: as in `Tokens`, so far.
        limit: of tokens.
        ends: ids that end it.
        greedy: tokens that are still to be the likeliest ones.
        template: of a chat whose user is still speaking; None in an answer or a plain text.
        fed: tokens that the model has read.
        done: whether it has ended.
    """

    number: int
    ids: list[int]
    limit: int
    ends: frozenset[int]
    greedy: int = 0
    template: Template | None = None
    learn: list[bool] = field(default_factory=list)
    fed: int = 0
    done: bool = False
    shape: str = "text"

    def __post_init__(self) -> None:
        self.learn = [False] * len(self.ids)  # nobody can predict a random token, and a template need not be learnt
        self.opening = len(self.ids)

    @property
    def ready(self) -> bool:
        """Whether the model, once it has read the next token, says what follows."""
        return self.fed == len(self.ids) - 1 and not self.done

    @property
    def begins(self) -> bool:
        """Whether the next token may not end anything, so that no turn is empty."""
        return self.greedy > 0 or (self.template is not None and len(self.ids) == self.opening)

    def take(self, token: int) -> int:
        """One more token that the model wrote; returns how many the document grew by."""
        length = len(self.ids)
        self.greedy = max(0, self.greedy - 1)
        self._add([token], True)
        if self.template is not None and token == self.template.after[0]:
            self._answer(self.template.after[1:])
        elif token in self.ends:
            self.done = True
        elif self.template is not None and len(self.ids) >= self.limit // 2:  # a user who does not come to an end
            self._answer(self.template.after)
        self.done |= len(self.ids) >= self.limit
        return len(self.ids) - length

    def _answer(self, opening: list[int]) -> None:
        self._add(opening, False)
        self.template = None

    def _add(self, ids: list[int], learn: bool) -> None:
        ids = ids[: self.limit - len(self.ids)]
        self.ids += ids
        self.learn += [learn] * len(ids)

    def tokens(self) -> Tokens:
        """As a source gives it."""
        return Tokens(np.array(self.ids, np.int32), np.array(self.learn, np.bool_), self.shape)


def write(
    teacher: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    settings: Generate,
    *,
    seq_len: int,
    seed: int,
    advance: Callable[[int], None],
    wanted: int | None = None,
    documents: int | None = None,
) -> Iterator[Tokens]:
    """Documents of at most seq_len tokens, in the order in which they began; one ends earlier where the teacher writes
    an end-of-text token.

    The stream depends only on the weights, the settings, `seed` and the device. End-of-text is not allowed
    among the greedy tokens, so that no document is nearly empty.

    Args:
        teacher: a Hugging Face causal LM; it is put in evaluation mode while it writes.
        tokenizer: says which ids are text, which end it, and whether a BOS token comes first.
        settings: temperature, number of greedy tokens, documents at a time, share of chats.
        seq_len: length at which a document is cut.
        seed: of the random numbers.
        advance: called with the number of tokens that were written.
        wanted, documents: begin no more when there are so many tokens or documents; None for no limit.
    """
    device = next(teacher.parameters()).device
    begin = _beginnings(teacher, tokenizer, settings, seq_len, seed)
    generator = torch.Generator(device).manual_seed(seed)
    with evaluating(teacher), in_bf16(teacher, settings.precision == "bf16" or _faster(settings, device)):
        free = apart(teacher, seq_len)
        count = settings.batch or rows_that_fit(
            teacher, seq_len, ROWS_ON_GPU if device.type == "cuda" else ROWS_ON_CPU, free_bytes(device)
        )
        if wanted is not None:
            count = min(count, -(-wanted // seq_len))
        if documents is not None:
            count, begin = min(count, documents), itertools.islice(begin, documents)
        work = _Desk(Rows(teacher, count, seq_len, free), begin, count, wanted)
        while work.open:
            yield from (document.tokens() for document in work.step(settings, generator, advance))


def _faster(settings: Generate, device: torch.device) -> bool:
    return settings.precision == "auto" and fast_bf16(device)


class _Desk:
    """The documents being written, one per row, and those that wait for earlier ones to be finished: given in the order
    of their beginnings, a text that is cut off somewhere holds no more short documents than long ones."""

    def __init__(self, rows: Rows, begin: Iterator[_Document], count: int, wanted: int | None) -> None:
        self.rows, self.begin, self.wanted = rows, begin, wanted
        self.open = [next(begin) for _ in range(count)]
        self.length = sum(len(document.ids) for document in self.open)  # of all that have begun
        self.finished: dict[int, _Document] = {}
        self.given = 0

    def step(
        self, settings: Generate, generator: torch.Generator, advance: Callable[[int], None]
    ) -> Iterator[_Document]:
        """One more token of each document; gives those whose turn it is."""
        places = [min(document.fed, len(document.ids) - 1) for document in self.open]  # those that are done stay
        logits = self.rows.step([d.ids[place] for d, place in zip(self.open, places, strict=True)], places)
        written = _choose(logits, self.open, settings.temperature, generator)
        grown = 0
        for document, token in zip(self.open, written, strict=True):
            ready = document.ready
            document.fed += not document.done  # else its row waits to be taken out
            if ready:
                grown += document.take(token)
                if document.done:
                    self.finished[document.number] = document
        self.length += grown
        advance(grown)
        self._refill()
        while self.given in self.finished:
            yield self.finished.pop(self.given)
            self.given += 1

    def _refill(self) -> None:
        done = [row for row, document in enumerate(self.open) if document.done]
        if not done or (not self.rows.apart and len(done) < len(self.open)):
            return
        for row in done:
            enough = self.wanted is not None and self.length >= self.wanted
            document = None if enough else next(self.begin, None)
            if document is None:
                break
            self.open[row] = document
            self.length += len(document.ids)
        left = [row for row, document in enumerate(self.open) if not document.done]
        if not left:
            self.open = []
        elif self.rows.apart and len(left) <= CROWDED * len(self.open):
            self.rows.keep(left)
            self.open = [self.open[row] for row in left]


def _choose(logits: Tensor, documents: list[_Document], temperature: float, generator: torch.Generator) -> list[int]:
    """The next token of each document: the likeliest, or one drawn."""
    begins = [row for row, document in enumerate(documents) if document.begins]
    if begins:
        bars = [(row, token) for row in begins for token in _barred(documents[row])]
        if bars:
            where = torch.tensor(bars, device=logits.device).T
            logits[where[0], where[1]] = -torch.inf
    tokens = _drawn((logits / temperature).softmax(1), generator)
    greedy = torch.tensor([document.greedy > 0 for document in documents], device=logits.device)
    chosen: list[int] = torch.where(greedy, logits.argmax(1), tokens).tolist()
    return chosen


def _drawn(chances: Tensor, generator: torch.Generator) -> Tensor:
    """One index per row (rows, n), by its chance. A random number for each of the n, as `multinomial` takes, is most of
    a step's time on a CPU; on a GPU, sums in a fixed order would be."""
    if chances.is_cuda:
        return torch.multinomial(chances, 1, generator=generator)[:, 0]
    sums = chances.cumsum(1)
    drawn = torch.rand(len(chances), 1, generator=generator) * sums[:, -1:]
    return torch.searchsorted(sums, drawn, right=True)[:, 0].clamp(max=chances.shape[1] - 1)


def _barred(document: _Document) -> list[int]:
    """Ids that may not come first."""
    return sorted(document.ends | ({document.template.after[0]} if document.template is not None else set()))


def _beginnings(
    teacher: nn.Module, tokenizer: "PreTrainedTokenizerBase", settings: Generate, seq_len: int, seed: int
) -> Iterator[_Document]:
    """Endless documents with their openings: `settings.chats` of them chats, evenly spread."""
    ends = frozenset(_end_ids(teacher, tokenizer))
    chat = template(tokenizer) if settings.chats else None
    if chat is not None and len(chat.before) + len(chat.after) > seq_len // 2:
        around = len(chat.before) + len(chat.after)
        raise DataError(
            f"generate.chats: the chat template alone takes {around} tokens of rows of {seq_len}; raise data.seq_len "
            f"to {2 * around} or more, or set generate.chats to 0"
        )
    special = set(tokenizer.all_special_ids)
    texts = [i for i in range(_vocabulary(teacher, len(tokenizer))) if i not in special]
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    opening = first if first == [tokenizer.bos_token_id] else []
    for number in itertools.count():
        if chat is not None and int((number + 1) * settings.chats) > int(number * settings.chats):
            yield _Document(
                number, list(chat.before), seq_len, ends | {chat.after[0]}, template=chat, shape="written chat"
            )
        else:
            pick = texts[int(np.random.default_rng([seed, number]).integers(len(texts)))]
            yield _Document(number, [*opening, pick], seq_len, ends, settings.greedy_tokens, shape="written text")


def template(tokenizer: "PreTrainedTokenizerBase") -> Template:
    """What the tokenizer's chat template puts around a question.

    Raises:
        DataError: there is none, it does not show the question as it is, or what ends the question is no token of its
        own, so that nobody could know when the teacher has ended it.
    """
    advice = "set generate.chats to 0, or give chats as a file"
    if not tokenizer.chat_template:
        raise DataError(f"generate.chats needs a chat template, and this tokenizer has none; {advice}")
    messages = [{"role": "user", "content": QUESTION}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    before, found, after = text.partition(QUESTION)
    if not found or QUESTION in after:
        raise DataError(f"generate.chats: the chat template does not show a user's text once and as it is; {advice}")
    ids = [tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part in (before, after)]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if not ids[1] or ids[1][0] not in special | set(tokenizer.all_special_ids):
        raise DataError(
            f"generate.chats: the chat template ends a user's turn with {after[:40]!r}, which does not begin with a "
            f"special token, so that nobody knows where the teacher ends it; {advice}"
        )
    return Template(*ids)


def weights_digest(model: nn.Module) -> str:
    """sha256 over names, shapes, types and bytes of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _end_ids(teacher: nn.Module, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Every id that ends a text: the tokenizer's, and the one or several of the generation config."""
    configured = getattr(getattr(teacher, "generation_config", None), "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [tokenizer.eos_token_id, *several] if i is not None})


def _vocabulary(teacher: nn.Module, known: int) -> int:
    """Ids that both the model and its tokenizer know; models often pad their vocabulary."""
    config: Any = teacher.config
    return min(known, int(config.get_text_config().vocab_size))
