"""`qat generate` prints what the model wrote, all of it, as it comes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qat.cli import main
from qat.trainers.inspect import _Printer
from tests.checkpoints.test_decoding import TEXT, sentencepiece
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("make", [tiny_tokenizer, sentencepiece])
@pytest.mark.parametrize("skip_prompt", [False, True])
def test_lines_keep_their_indentation_and_characters_are_whole(
    make: type, skip_prompt: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers' TextStreamer begins anew after each line, where a SentencePiece token loses its space."""
    tokenizer = make()
    prompt, ids = tokenizer("dog")["input_ids"], tokenizer(TEXT)["input_ids"]
    printer = _Printer(tokenizer, skip_prompt)
    printer.put(torch.tensor([prompt]))
    for token in ids:
        printer.put(torch.tensor([token]))
    printer.end()
    assert capsys.readouterr().out == tokenizer.decode(ids if skip_prompt else prompt + ids) + "\n"


def test_the_command_prints_prompt_and_continuation(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, tokenizer = tiny_model("llama", tmp_path / "model", num_hidden_layers=1), tiny_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer("The quick", return_tensors="pt")
    for tokens in (1, 7, 8, 9):  # a random model writes broken characters
        made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0]
        assert main(["generate", str(folder), "The quick", "--tokens", str(tokens)]) == 0
        assert capfd.readouterr().out == tokenizer.decode(made, skip_special_tokens=True) + "\n"
