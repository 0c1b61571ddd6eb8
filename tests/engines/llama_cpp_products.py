"""Every product with weights that llama.cpp computes of one prompt; run by test_llama_cpp.py with the Python that has
llama_cpp.

    python llama_cpp_products.py IDS.npy OUT FILE.gguf...

Writes OUT/<stem>-products.npz: for each product, by the name of its weights, what went in and what came out, as
llama.cpp's callback for evaluated nodes sees them.
"""

import ctypes
import sys
from pathlib import Path
from typing import Any

import llama_cpp  # type: ignore[import-not-found]  # lives in an environment of its own
import numpy as np


class _Tensor(ctypes.Structure):
    """ggml_tensor of ggml.h."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


def matrix(tensor: _Tensor) -> np.ndarray[Any, Any] | None:
    """A contiguous float32 matrix, else None."""
    width, rows = tensor.ne[0], tensor.ne[1]
    if tensor.type != 0 or tensor.nb[0] != 4 or tensor.nb[1] != 4 * width or tensor.ne[2] != 1 or tensor.ne[3] != 1:
        return None
    raw = (ctypes.c_float * (width * rows)).from_address(tensor.data)
    return np.array(raw, dtype=np.float32).reshape(rows, width)


def products(file: str, ids: list[int]) -> dict[str, np.ndarray[Any, Any]]:
    """See above."""
    found: dict[str, np.ndarray[Any, Any]] = {}

    @llama_cpp.ggml_backend_sched_eval_callback  # type: ignore[untyped-decorator]  # of ctypes
    def look(pointer: int, ask: bool, _: None) -> bool:
        node = ctypes.cast(pointer, ctypes.POINTER(_Tensor)).contents
        if not ask and node.src[0] and node.src[1]:
            name = node.src[0].contents.name.decode()
            into, out = matrix(node.src[1].contents), matrix(node)
            if name.endswith(".weight") and into is not None and out is not None and into.shape[0] == out.shape[0]:
                found[f"{name}:in"], found[f"{name}:out"] = into, out
        return True

    model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
    how = llama_cpp.llama_context_default_params()
    how.n_ctx = how.n_batch = how.n_ubatch = len(ids)
    how.n_threads = how.n_threads_batch = 1
    how.cb_eval = look
    context = llama_cpp.llama_init_from_model(model, how)
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    if llama_cpp.llama_decode(context, batch):
        raise SystemExit(f"llama.cpp does not evaluate {file}")
    return found


def main(ids: str, out: str, *files: str) -> None:
    """See above."""
    llama_cpp.llama_backend_init()
    for file in files:
        np.savez(Path(out) / f"{Path(file).stem}-products.npz", **products(file, np.load(ids)[0].tolist()))


if __name__ == "__main__":
    main(*sys.argv[1:])
