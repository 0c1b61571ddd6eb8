"""Spaces beside added tokens. tokenizer.json says of each token whether it swallows them; a GGUF file says nothing,
and llama.cpp goes by the model's name: where `general.name` holds "phi-3" or "phi3", added tokens swallow what follows
them. So the name decides how text is read, and is written such that llama.cpp does as the tokenizer does.
"""

import re
import warnings
from pathlib import Path
from typing import Any

from qat.checkpoints.hf import read_json
from qat.text import some

_KEEPS = ("<unk>", "<s>", "<|endoftext|>")  # those that swallow nothing even so
_NEEDS = ("</s>", *_KEEPS)  # without one of these llama.cpp does not load a model of that name
_CALLED = re.compile("phi-?3", re.IGNORECASE)


def swallows(name: str, token: str) -> bool:
    """Whether llama.cpp drops spaces behind an added token of a model of that name."""
    return _CALLED.search(name) is not None and token not in _KEEPS


def name_for(name: str, source: Path) -> str:
    """`name`, changed as little as makes llama.cpp treat spaces beside added tokens as the tokenizer in `source` does.
    The converter's own spelling of Microsoft's folders ("Phi 3 Mini") is one that llama.cpp does not recognize.

    Warns:
        UserWarning: of tokens that no name is right for.
    """
    file = source / "tokenizer.json"
    whole: dict[str, Any] = read_json(file) if file.is_file() else {}
    tokens, called = whole.get("added_tokens") or [], _CALLED.search(name) is not None
    wrong = {
        each: [
            token["content"]
            for token in tokens
            if token.get("lstrip") or bool(token.get("rstrip")) != swallows("phi3" if each else "", token["content"])
        ]
        for each in (False, True)
    }
    vocabulary = {*whole.get("model", {}).get("vocab", ()), *(token["content"] for token in tokens)}
    able = {*_NEEDS} <= vocabulary
    better = called if len(wrong[True]) == len(wrong[False]) else len(wrong[True]) < len(wrong[False])
    should = able and better
    if wrong[should]:
        warnings.warn(
            f"spaces beside {some(wrong[should])} are read otherwise by llama.cpp than by this tokenizer, which a GGUF "
            "file has no way to say; leave none there",
            UserWarning,
            stacklevel=2,
        )
    if should == called:
        return name
    other = "Phi-3" if should else "Phi 3"
    changed, count = re.subn("phi[ _-]?3", other, name, flags=re.IGNORECASE)
    return changed if count else f"{name} (Phi-3)"
