"""What the names of architectures mean: fused sets, lists of experts, tables of positions, and stacks of matrices."""

import torch

from qat.families import DEFAULT, FAMILIES, Family, expert_list, find_family, fused_sets, is_outside, stacks


def test_siblings_that_engines_merge_are_sets() -> None:
    paths = [f"model.layers.{n}.self_attn.{leaf}" for n in (0, 1) for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")]
    experts = [f"model.layers.0.mlp.experts.{n}.{leaf}" for n in (0, 1) for leaf in ("w1", "w2", "w3")]
    sets = fused_sets([*paths, *experts, "a.gate_proj", "b.up_proj"], DEFAULT.fused)
    assert sets == [paths[:3], paths[4:7], [experts[0], experts[2]], [experts[3], experts[5]]]
    assert fused_sets(paths, ()) == [] and fused_sets(paths, (("o_proj", "v_proj"),)) == [paths[2:4], paths[6:]]


def test_a_family_is_one_entry() -> None:
    assert find_family("llama") is find_family(None) is DEFAULT
    assert find_family("mpt").positions_key == "max_seq_len" and find_family("mpt").fused == DEFAULT.fused
    assert all(isinstance(family, Family) and family != DEFAULT for family in FAMILIES.values())


def test_names_that_mean_something() -> None:
    assert expert_list("model.layers.3.mlp.experts.11.up_proj") == "model.layers.3.mlp.experts"
    assert expert_list("model.layers.3.mlp.shared_experts.up_proj") is None
    assert is_outside("lm_head") and not is_outside("model.lm_head")
    assert DEFAULT.holds_positions("model.decoder.embed_positions") and DEFAULT.holds_positions("transformer.wpe")
    assert not DEFAULT.holds_positions("positions.embed_tokens")


def test_convolutions_and_padded_vectors_are_not_stacks() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv1d(4, 4, 3)
            self.linear = torch.nn.Linear(4, 4)
            self.token = torch.nn.Parameter(torch.zeros(1, 1, 8))
            self.one_expert = torch.nn.Parameter(torch.zeros(1, 8, 8))

    assert stacks(Odd()) == ["one_expert"]
    assert stacks(torch.nn.ModuleDict({"a": Odd()})) == ["a.one_expert"]
