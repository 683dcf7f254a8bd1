"""Load or create a causal language model, and run it under a plan: hidden states, logits, log-probs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from treepo.errors import ConfigError
from treepo.models import attention, lora
from treepo.models.attention import Causal, Plan, install
from treepo.models.settings import LoraSettings, ModelSettings, Shape

CHUNK_LOGITS = 1 << 23  # logits alive at once in `token_logprobs`: 32 MB in float32

PLAIN_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device(settings: ModelSettings) -> torch.device:
    """The torch device that `settings.device` names."""
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=settings.device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"model.device: {settings.device!r} is not usable here: {reason}") from error


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer saved in a model folder. The folder of an adapter may have none: then its base's is loaded.

    AutoTokenizer decides by the type of the model: it takes the tokenizer of any Qwen2-shaped folder for Qwen2's own.
    So a tokenizer that was saved as a plain `tokenizers` file is loaded as one, without AutoTokenizer.
    """
    saved = Path(path).expanduser() / "tokenizer_config.json"
    if not saved.is_file() and (base := lora.base_of(path)) is not None:
        return load_tokenizer(base)
    plain = saved.is_file() and json.loads(saved.read_text(encoding="utf-8")).get("tokenizer_class") in PLAIN_TOKENIZERS
    tokenizer: PreTrainedTokenizerBase = _from_pretrained(PreTrainedTokenizerFast if plain else AutoTokenizer, path)
    return tokenizer


def load(
    path: str, dtype: str = "float32", device: torch.device | str = "cpu", adapter: LoraSettings | None = None
) -> PreTrainedModel:
    """The causal LM in folder (or Hub repository) `path`, safetensors only, ready for plans.

    For a folder that holds an adapter, this is its base. Without `adapter`, the adapter is merged into the base. With
    `adapter` (its settings), it is put beside the base, so that training can go on with it.

    Raises `ConfigError` if the model cannot be loaded or cannot run under a plan (`prepare`).
    """
    base = lora.base_of(path)
    options = {"dtype": DTYPES[dtype], "use_safetensors": True}
    model: PreTrainedModel = _from_pretrained(AutoModelForCausalLM, base or path, **options).to(device)
    _align(model)
    if base is None:
        return prepare(model)
    if adapter is None:
        return prepare(lora.merged(model, Path(path).expanduser()))
    lora.restore(prepare(model), Path(path).expanduser(), adapter)
    lora.settings_of(model).base_model_name_or_path = base
    return model


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Overwrite the weights of `model`, or of its adapter if it has one, with those in `folder`.

    Raises `ConfigError` if `folder` holds weights of other shapes.
    """
    if lora.adapted(model):
        lora.load_weights(model, folder)
        return
    saved = _from_pretrained(AutoModelForCausalLM, str(folder), dtype=model.dtype, use_safetensors=True)
    try:
        model.load_state_dict(saved.state_dict())
    except RuntimeError as error:
        raise ConfigError(f"{folder} holds another model than the one to load it into: {error}") from error


def create(
    shape: Shape,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """A new Qwen2-shaped model whose random weights are a function of `seed`."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.ffn,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])  # type: ignore[no-untyped-call]
    return prepare(model.to(device))


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Let `model` attend through plans (in place), and check that it computes the same logits as before.

    Raises `ConfigError` for models that treepo would compute wrongly: sliding windows, linear attention, attention
    dropout, rope scaling that depends on the length, scaled or capped logits, keys and values of different sizes, or
    an attention that does not use the interface of transformers.
    """
    config = model.config
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layers != {"full_attention"} or getattr(config, "sliding_window", None) is not None:
        found = ", ".join(sorted(layers - {"full_attention"})) or f"sliding_window={config.sliding_window}"
        raise ConfigError(f"model: {config.model_type} uses {found}; only full attention is supported")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise ConfigError(
            f"model: {config.model_type} has {rope} rope scaling, whose angles depend on the batch's length"
        )
    if getattr(config, "attention_dropout", 0.0):
        raise ConfigError("model: attention_dropout must be 0: in a packed pass all paths would share one dropout mask")
    model.eval()  # type: ignore[no-untyped-call]
    ids = torch.arange(8, device=model.device)[None] % config.vocab_size
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits.float()
        probe = _Probe()
        try:
            install(model)
            planned = logits(model, _hidden(model, ids, torch.arange(8, device=model.device)[None], probe)).float()
        except (ValueError, TypeError) as error:
            raise ConfigError(f"model: {config.model_type} cannot run under treepo's attention: {error}") from error
    if probe.layers != set(range(config.num_hidden_layers)):
        raise ConfigError(f"model: {config.model_type} has attention of its own, which a treepo plan does not reach")
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    if (off := (planned - plain).abs().max().item()) > tolerance * max(1.0, plain.abs().max().item()):
        raise ConfigError(f"model: {config.model_type} computes other logits under treepo's attention (by {off:.2g})")
    return model


def prepared(model: PreTrainedModel) -> PreTrainedModel:
    """`model`. It is prepared (in place) if it was not yet."""
    return model if _is_prepared(model) else prepare(model)


def _is_prepared(model: PreTrainedModel) -> bool:
    return getattr(model.config, "_attn_implementation", None) == attention.NAME


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let `model` (in place) keep only the inputs of its layers, and compute the rest again in the backward pass.

    Raises `ConfigError` for a model that does not support it.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(f"trainer.gradient_checkpointing: {error}") from error
    # transformers checkpoints only layers that are in training mode. The modules inside stay in evaluation mode, so
    # that dropout and the like stay off.
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


class _Probe(Causal):
    """Records which layers call the plan. Refuses keys and values of different sizes: engines cannot cache these."""

    def __init__(self) -> None:
        self.layers: set[int] = set()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if k.shape != v.shape:
            raise ValueError(f"keys of size {k.shape[-1]} with values of size {v.shape[-1]} are not supported")
        self.layers.add(layer)
        return super().attend(layer, q, k, v, scale)


def hidden(model: PreTrainedModel, token_ids: Tensor, positions: Tensor, plan: Plan) -> Tensor:
    """Final hidden states [B, T, hidden] of `token_ids` [B, T] at `positions` [B, T]. No logits are computed.

    Raises `ValueError` for a model that is not prepared: it would ignore the plan.
    """
    if not _is_prepared(model):
        raise ValueError("the model does not attend through treepo's plans yet: call causal_lm.prepare(model) once")
    return _hidden(model, token_ids, positions, plan)


def _hidden(model: PreTrainedModel, token_ids: Tensor, positions: Tensor, plan: Plan) -> Tensor:
    body = model.base_model
    states: Tensor = body(input_ids=token_ids, position_ids=positions, use_cache=False, plan=plan).last_hidden_state
    return states


def logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Logits [..., V] of hidden states [..., hidden]."""
    scores: Tensor = model.get_output_embeddings()(states)  # type: ignore[no-untyped-call]
    return scores


def token_logprobs(
    model: PreTrainedModel, states: Tensor, token_ids: Tensor, *, temperature: float = 1.0, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs [n] of `token_ids` [n] under the logits of `states` [n, hidden] at `temperature`, and entropies [n].

    Both are in nats. An entropy is that of the whole distribution at the token, and has no gradient. Only `chunk` rows
    of logits exist at a time (default: as many as make `CHUNK_LOGITS` numbers). The backward pass computes them again.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    chunk = chunk or max(1, CHUNK_LOGITS // model.config.vocab_size)
    chunks = list(zip(torch.split(states, chunk), torch.split(token_ids, chunk), strict=True))
    entropies: list[Tensor] = []

    def some(states: Tensor, token_ids: Tensor) -> Tensor:
        scores = logits(model, states)
        scores = scores if scores.dtype == torch.float64 else scores.float()
        scores = scores if temperature == 1.0 else scores / temperature
        if len(entropies) < len(chunks):  # once, not again in the backward pass
            entropies.append(_entropy(scores.detach()))
        return -F.cross_entropy(scores, token_ids, reduction="none")

    found = [
        checkpoint(some, *part, use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else some(*part)
        for part in chunks
    ]
    return torch.cat(found), torch.cat(entropies)


def _entropy(scores: Tensor) -> Tensor:
    """Entropies [n] of the distributions with the logits `scores` [n, V]. Only one copy of them exists at a time."""
    chances = scores.softmax(-1)
    torch.special.entr(chances, out=chances)
    return chances.sum(-1)


def context(model: PreTrainedModel) -> int:
    """Most tokens of prompt and response that the model was made for; a very large number if it does not say."""
    return int(getattr(model.config, "max_position_embeddings", 0)) or 1 << 30


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every id that ends a response: the tokenizer's EOS and all that the generation config lists.

    Raises `ConfigError` if there is none.
    """
    listed = model.generation_config.eos_token_id if model.generation_config else None
    ids = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])} - {None}
    if not ids:
        raise ConfigError("the tokenizer has no EOS token: set `eos_token` in its tokenizer_config.json")
    return frozenset(ids)


def _align(model: PreTrainedModel) -> None:
    """Copy the weights into memory of torch's own, as those of a new model are.

    Loaded weights may lie in the file's memory, at any multiple of 8 bytes. Torch aligns to 64 bytes. A matrix product
    on a CPU can differ in its last bits between the two, and then a resumed run would not be bit-identical.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _from_pretrained(loader: Any, path: str, **options: Any) -> Any:
    folder = Path(path).expanduser()
    if folder.exists() and not any((folder / name).is_file() for name in ("config.json", lora.CONFIG)):
        raise ConfigError(f"model.path: {path} is not a folder with a config.json")
    if not folder.exists() and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        raise ConfigError(f"model.path: there is no folder {path} (a model of the Hub is named owner/name)")
    try:
        return loader.from_pretrained(str(folder) if folder.exists() else path, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        where = "" if folder.exists() else " (no such folder, so it was looked for on the Hub)"
        raise ConfigError(f"model.path: cannot load {path}{where}: {reason}") from error
