"""llama.cpp's own converter, for test_llama_cpp.py: python llama_cpp_convert.py SOURCE MODEL OUT.gguf

SOURCE is a folder with llama.cpp's convert_hf_to_gguf.py. It knows tokenizers by a digest of what they make of one
text, so that the one of the tests, which it does not know, is called by what it does.
"""

import runpy
import sys


def main(source: str, model: str, out: str) -> None:
    """See above."""
    sys.path[:0] = [f"{source}/gguf-py", source]
    from conversion import base  # type: ignore[import-not-found]  # llama.cpp's

    known = base.TextModel.get_vocab_base_pre

    def rule(self: object, tokenizer: object) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            return "gpt-2"

    base.TextModel.get_vocab_base_pre = rule
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", out, "--outtype", "bf16"]
    runpy.run_path(f"{source}/convert_hf_to_gguf.py", run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
