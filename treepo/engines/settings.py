"""What a configuration says about its engine: one class per kind. Loads no torch and no HTTP client."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator

from treepo.errors import nearest
from treepo.settings import Settings


class LocalSettings(Settings):
    """Decode on the model that is trained, in this process."""

    kind: Literal["local"] = "local"
    slots: int = Field(default=128, gt=0, description="Segments decoded at once.")
    max_tokens: int | None = Field(
        default=None, gt=1, description="Most tokens of prompt and response in a slot; default: the model's context."
    )
    memory_gib: float | None = Field(
        default=None,
        gt=0,
        description="Most GiB of key-values, of all slots and of the open trees; default: no limit. Trees that do not "
        "fit wait for older ones, and rows share no pages.",
    )
    cuda_graphs: bool = Field(default=True, description="On CUDA, replay recorded steps; elsewhere without effect.")


class ServerSettings(Settings):
    """Decode on inference servers over HTTP: vLLM, SGLang or `treepo serve`, one or several of the same model."""

    kind: Literal["server"]
    urls: list[str] = Field(min_length=1, description="Of every server (replica), e.g. http://127.0.0.1:8000.")
    dialect: Literal["auto", "vllm", "completions", "sglang"] = Field(
        "auto",
        description="How they are spoken to: vllm is /inference/v1/generate, completions is /v1/completions with token "
        "ids (vLLM), sglang is /generate; auto asks each server.",
    )
    api_key_env: str | None = Field(
        None, description="Environment variable that holds the API key, sent as a bearer token; default: none is sent."
    )
    concurrency: int = Field(256, ge=1, description="Most requests under way at once, per server.")
    timeout_s: float = Field(600.0, gt=0, description="Most seconds that a server may leave a request without a byte.")
    connect_s: float = Field(10.0, gt=0, description="Most seconds until a connection stands.")
    retries: int = Field(3, ge=0, description="Times that a request is sent again before its server counts as dead.")
    backoff_s: float = Field(
        0.5,
        gt=0,
        description="Seconds before the first retry; each further one waits twice as long, plus or minus half.",
    )
    revive_s: float = Field(30.0, ge=0, description="Seconds after which a dead server is asked again.")
    block_tokens: int | None = Field(
        None, ge=1, description="Tokens per block of their prefix caches; default: 16 for vLLM, 1 for the others."
    )
    weights_dir: str | None = Field(
        None,
        description="Folder, seen by all servers under the same path, through which they get new weights; default: "
        "`weights` in the run's folder.",
    )
    tolerance: float = Field(
        0.05,
        gt=0,
        description="Largest difference in nats between the log-probs of a server and of the model here; for servers "
        "that compute in bfloat16 about 0.2.",
    )

    @field_validator("urls")
    @classmethod
    def _are_urls(cls, urls: list[str]) -> list[str]:
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} is no address such as http://127.0.0.1:8000")
        plain = [url.rstrip("/").removesuffix("/v1") for url in urls]
        if twice := sorted({url for url in plain if plain.count(url) > 1}):
            raise ValueError(f"{twice[0]} is listed twice")
        return plain


class VLLMSettings(Settings):
    """Decode on vLLM in this process, on the same device as the training or on its own ones."""

    kind: Literal["vllm"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="What vLLM computes in; auto: as the model here."
    )
    block_tokens: int | None = Field(
        None, ge=1, description="Tokens per block of the prefix cache; default: 16, on CPUs 32."
    )
    max_num_seqs: int = Field(256, ge=1, description="Most segments decoded at once.")
    max_model_len: int | None = Field(
        None, ge=2, description="Most tokens of prompt and response; default: the model's context."
    )
    gpu_memory_utilization: float = Field(
        0.4, gt=0, lt=1, description="Share of the GPU's memory for vLLM; what is left is for training."
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share the model.")
    enforce_eager: bool = Field(False, description="Start faster, without compiling or CUDA graphs, and decode slower.")
    args: dict[str, Any] = Field({}, description="Anything else that vLLM's AsyncEngineArgs take, as they call it.")
    transfer: Literal["auto", "folder"] = Field(
        "auto",
        description="How vLLM gets new weights. auto: on the GPU that it shares with the model, if it does (one "
        "process, no adapter, one GPU for decoding), else through weights_dir; folder: always that way.",
    )
    weights_dir: str | None = Field(
        None, description="Folder through which vLLM gets new weights; default: `weights` in the run's folder."
    )
    tolerance: float = Field(
        0.05,
        gt=0,
        description="Largest difference in nats between vLLM's log-probs and those of the model here; where it "
        "computes in bfloat16 about 0.2.",
    )


KINDS = ("local", "server", "vllm")


def _kind(value: Any) -> Any:
    return value.get("kind", KINDS[0]) if isinstance(value, dict) else getattr(value, "kind", KINDS[0])


def _known(kinds: Collection[str]) -> BeforeValidator:
    def known(value: Any) -> Any:
        kind = _kind(value)
        if not isinstance(kind, str) or kind not in kinds:
            hint = nearest(kind, kinds) if isinstance(kind, str) else ""
            raise ValueError(f"kind {kind!r} is none of {', '.join(kinds)}{hint}")
        return value

    return BeforeValidator(known)


EngineSettings = Annotated[
    Annotated[LocalSettings, Tag("local")]
    | Annotated[ServerSettings, Tag("server")]
    | Annotated[VLLMSettings, Tag("vllm")],
    Discriminator(_kind),
    _known(KINDS),
]
"""`kind` may be left out: local."""
