"""Rows and columns of the layers that benchmarks measure: real models' and a square one."""

LAYERS = {
    "large": {
        "Llama-8B qkv": (6144, 4096),
        "Llama-8B o": (4096, 4096),
        "Llama-8B gate_up": (28672, 4096),
        "Llama-8B down": (4096, 14336),
        "square": (8192, 8192),
    },
    "small": {"SmolLM2 q": (576, 576), "SmolLM2 gate": (1536, 576), "SmolLM2 down": (576, 1536), "4096": (4096, 4096)},
}
