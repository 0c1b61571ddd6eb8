"""Rows and columns of the layers that benchmarks measure: real models' and a square one."""

LAYERS = {
    "large": {
        "Llama-8B qkv": (6144, 4096),
        "Llama-8B o": (4096, 4096),
        "Llama-8B gate_up": (28672, 4096),
        "Llama-8B down": (4096, 14336),
        "square": (8192, 8192),
    },
    "models": {
        "Llama-3 8B, Qwen3 8B qkv": (6144, 4096),
        "Llama-3 8B, Qwen3 8B o": (4096, 4096),
        "Llama-3 8B gate_up": (28672, 4096),
        "Llama-3 8B down": (4096, 14336),
        "Qwen3 8B gate_up": (24576, 4096),
        "Qwen3 8B down": (4096, 12288),
        "Qwen3 32B qkv": (10240, 5120),
        "Qwen3 32B o": (5120, 8192),
        "Qwen3 32B gate_up": (51200, 5120),
        "Qwen3 32B down": (5120, 25600),
        "square": (8192, 8192),
    },
    "small": {"SmolLM2 q": (576, 576), "SmolLM2 gate": (1536, 576), "SmolLM2 down": (576, 1536), "4096": (4096, 4096)},
}
