"""Convert parameter names between the published checkpoint and these networks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

OFFICIAL_PREFIX = "module."
PATCH_WEIGHT = "vit.patch_embedding.patch_embeddings.1.weight"

# Published name -> ours, of modules that hold a weight and a bias; {i} counts blocks.
OFFICIAL_MODULES = {
    "encoder.patch_embed.proj": "vit.patch_embedding.patch_embeddings.1",
    "encoder.blocks.{i}.norm1": "vit.blocks.{i}.norm1",
    "encoder.blocks.{i}.attn.qkv": "vit.blocks.{i}.attn.qkv",
    "encoder.blocks.{i}.attn.proj": "vit.blocks.{i}.attn.out_proj",
    "encoder.blocks.{i}.norm2": "vit.blocks.{i}.norm2",
    "encoder.blocks.{i}.mlp.fc1": "vit.blocks.{i}.mlp.linear1",
    "encoder.blocks.{i}.mlp.fc2": "vit.blocks.{i}.mlp.linear2",
    "encoder.norm": "vit.norm",
    "encoder_to_decoder.{i}": "decoder.decoder_embeds.{i}",
    "decoder.blocks.{i}.norm1": "decoder.blocks.{i}.norm1",
    "decoder.blocks.{i}.attn.qkv": "decoder.blocks.{i}.attn.qkv",
    "decoder.blocks.{i}.attn.proj": "decoder.blocks.{i}.attn.out_proj",
    "decoder.blocks.{i}.norm2": "decoder.blocks.{i}.norm2",
    "decoder.blocks.{i}.mlp.fc1": "decoder.blocks.{i}.mlp.linear1",
    "decoder.blocks.{i}.mlp.fc2": "decoder.blocks.{i}.mlp.linear2",
    "decoder.cross_attention_blocks.{i}.norm0": "decoder.cross_blocks.{i}.norm0",
    "decoder.cross_attention_blocks.{i}.self_attn.qkv": "decoder.cross_blocks.{i}.self_attn.qkv",
    "decoder.cross_attention_blocks.{i}.self_attn.proj": "decoder.cross_blocks.{i}.self_attn.out_proj",
    "decoder.cross_attention_blocks.{i}.norm1": "decoder.cross_blocks.{i}.norm1",
    "decoder.cross_attention_blocks.{i}.cross_attn.q": "decoder.cross_blocks.{i}.cross_attn.q",
    "decoder.cross_attention_blocks.{i}.cross_attn.kv": "decoder.cross_blocks.{i}.cross_attn.kv",
    "decoder.cross_attention_blocks.{i}.cross_attn.proj": "decoder.cross_blocks.{i}.cross_attn.out_proj",
    "decoder.cross_attention_blocks.{i}.norm2": "decoder.cross_blocks.{i}.norm2",
    "decoder.cross_attention_blocks.{i}.mlp.fc1": "decoder.cross_blocks.{i}.mlp.linear1",
    "decoder.cross_attention_blocks.{i}.mlp.fc2": "decoder.cross_blocks.{i}.mlp.linear2",
    "decoder.norm": "decoder.norm",
    "decoder.head": "decoder.head",
}
# Published name -> ours, of single tensors.
OFFICIAL_TENSORS = {
    "mask_token": "decoder.mask_token",
    "encoder_pos_embed": "vit.patch_embedding.position_embeddings",
    "decoder_pos_embed": "decoder.position_embeddings",
    "encoder.cls_token": "vit.cls_token",
}


def official_names(num_layers: int, num_self_layers: int, num_cross_blocks: int) -> dict[str, str]:
    """Return the one-to-one table of parameter names, published to ours, for a network of the given depths.

    Args:
        num_layers: encoder blocks.
        num_self_layers: plain decoder blocks.
        num_cross_blocks: cross blocks.
    """
    repeats = {
        "encoder.blocks.": num_layers,
        "decoder.blocks.": num_self_layers,
        "decoder.cross_attention_blocks.": num_cross_blocks,
        "encoder_to_decoder.": num_cross_blocks + 1,
    }
    names = dict(OFFICIAL_TENSORS)
    for official, ours in OFFICIAL_MODULES.items():
        count = next((n for prefix, n in repeats.items() if official.startswith(prefix)), 1)
        for i in range(count):
            for tensor in ("weight", "bias"):
                names[f"{official}.{tensor}".format(i=i)] = f"{ours}.{tensor}".format(i=i)
    return names


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """Return the number of modules `prefix0.`, `prefix1.` ... among parameter names."""
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})


def from_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a published pre-training state_dict for :class:`HiEndMAE`.

    The patch embedding, stored as a convolution [E, C, p, p, p], becomes a matrix [E, p * p * p * C] with the channel
    last, as patches are laid out. Names that the table does not know are kept, for the loader to report.
    """
    weights = {name.removeprefix(OFFICIAL_PREFIX): tensor for name, tensor in state_dict.items()}
    table = official_names(
        count_blocks(weights, "encoder.blocks."),
        count_blocks(weights, "decoder.blocks."),
        count_blocks(weights, "decoder.cross_attention_blocks."),
    )
    ours = {table.get(name, name): tensor for name, tensor in weights.items()}
    ours[PATCH_WEIGHT] = ours[PATCH_WEIGHT].permute(0, 2, 3, 4, 1).flatten(1)
    return ours


def to_official(state_dict: Mapping[str, Tensor], patch_size: Sequence[int]) -> dict[str, Tensor]:
    """Rename a state_dict of :class:`HiEndMAE` to the published names; inverse of :func:`from_official`.

    Args:
        state_dict: all weights of a `HiEndMAE`.
        patch_size: (p_h, p_w, p_d), which the flattened patch embedding does not tell.

    Raises:
        KeyError: for a parameter that the published network does not have.
    """
    table = official_names(
        count_blocks(state_dict, "vit.blocks."),
        count_blocks(state_dict, "decoder.blocks."),
        count_blocks(state_dict, "decoder.cross_blocks."),
    )
    official = {ours: name for name, ours in table.items()}
    weights = {official[name]: tensor for name, tensor in state_dict.items()}
    patch = weights["encoder.patch_embed.proj.weight"]
    weights["encoder.patch_embed.proj.weight"] = patch.unflatten(1, (*patch_size, -1)).permute(0, 4, 1, 2, 3)
    return {OFFICIAL_PREFIX + name: tensor for name, tensor in weights.items()}
