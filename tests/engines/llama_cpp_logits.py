"""What llama.cpp computes of GGUF files; run by test_llama_cpp.py with the Python that has llama_cpp.

    python llama_cpp_logits.py IDS.npy OUT FILE.gguf...

Writes OUT/<stem>.npy, float32 logits of the rows of IDS, which go through the file one by one. Keys and values are kept
in float32, so that nothing is rounded but what the file's types ask for.
"""

import sys
from pathlib import Path

import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama  # type: ignore[import-not-found]  # lives in an environment of its own


def main(ids: str, out: str, *files: str) -> None:
    """See above."""
    rows = np.load(ids)
    for file in map(Path, files):
        model = Llama(
            str(file),
            n_ctx=rows.shape[1],
            n_batch=rows.shape[1],
            n_threads=1,
            logits_all=True,
            flash_attn=False,
            type_k=GGML_TYPE_F32,
            type_v=GGML_TYPE_F32,
            verbose=False,
        )
        logits = []
        for row in rows.tolist():
            model.reset()
            model.eval(row)
            logits.append(np.array(model.scores[: len(row)], dtype=np.float32))
        np.save(Path(out) / f"{file.stem}.npy", np.stack(logits))
        print(model.detokenize(model.tokenize(b"In 1984, they said: it's fine.", add_bos=False)).decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
