"""The settings of engines: one class per kind. This module loads no torch and no HTTP client."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from treepo.engines import Engine
from treepo.settings import Settings
from treepo.user_code import Custom, kind_of, one_of


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
    cuda_graphs: bool = Field(default=True, description="On CUDA, replay recorded steps; no effect on a CPU.")


class ServerSettings(Settings):
    """Decode on inference servers over HTTP: vLLM, SGLang or `treepo serve`, one or several of the same model."""

    kind: Literal["server"] = "server"
    urls: list[str] = Field(min_length=1, description="Of every server (replica), e.g. http://127.0.0.1:8000.")
    dialect: Literal["auto", "vllm", "completions", "sglang"] = Field(
        "auto",
        description="The wire protocol: vllm is /inference/v1/generate, completions is /v1/completions with token ids "
        "(vLLM), sglang is /generate; auto asks each server which of them it has.",
    )
    api_key_env: str | None = Field(
        None, description="Environment variable that holds the API key, sent as a bearer token; default: none is sent."
    )
    concurrency: int = Field(256, ge=1, description="Most requests at a time, per server.")
    timeout_s: float = Field(
        600.0, gt=0, description="Most seconds that a request waits for the next byte of its answer."
    )
    connect_s: float = Field(10.0, gt=0, description="Most seconds until a connection is made.")
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
        description="Folder through which servers get new weights; all must see it under the same path. Default: "
        "`weights` in the run's folder.",
    )
    tolerance: float = Field(
        0.05,
        gt=0,
        description="Largest difference in nats between the log-probs of a server and of the model here; for servers "
        "that compute in bfloat16, take about 0.2.",
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

    kind: Literal["vllm"] = "vllm"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="The numbers that vLLM computes with; auto: those of the model here."
    )
    block_tokens: int | None = Field(
        None, ge=1, description="Tokens per block of the prefix cache; default: 16, on CPUs 32."
    )
    max_num_seqs: int = Field(256, ge=1, description="Most segments decoded at once.")
    max_model_len: int | None = Field(
        None, ge=2, description="Most tokens of prompt and response; default: the model's context."
    )
    gpu_memory_utilization: float = Field(
        0.4, gt=0, lt=1, description="Share of the GPU's memory for vLLM; the rest is for training."
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share the model.")
    enforce_eager: bool = Field(False, description="Start faster, without compiling or CUDA graphs, but decode slower.")
    args: dict[str, Any] = Field({}, description="More arguments of vLLM's AsyncEngineArgs, under their names there.")
    transfer: Literal["auto", "folder"] = Field(
        "auto",
        description="How vLLM gets new weights. auto: from GPU memory if vLLM shares the model's GPU (one process, no "
        "adapter, one GPU for decoding), else through weights_dir; folder: always through weights_dir.",
    )
    weights_dir: str | None = Field(
        None, description="Folder through which vLLM gets new weights; default: `weights` in the run's folder."
    )
    tolerance: float = Field(
        0.05,
        gt=0,
        description="Largest difference in nats between vLLM's log-probs and those of the model here; if vLLM computes "
        "in bfloat16, take about 0.2.",
    )


class CustomEngine(Custom):
    """A class of yours, called as `MyEngine(model, **keys)`, with what `treepo.engines.Engine` has.

    `model` is the model that is trained, ready for `treepo.models.causal_lm`. An engine that decodes on it, as
    `LocalEngine` does, must not be combined with `trainer.ahead`: the update would change the model while it decodes.
    """

    first: ClassVar[tuple[str, ...]] = ("model",)
    calls: ClassVar[dict[str, Any]] = {
        "start": Engine.start,
        "open": Engine.open,
        "load_weights": Engine.load_weights,
        "close": Engine.close,
    }
    counts: ClassVar[tuple[str, ...]] = ("granularity", "context", "tree_tokens")
    """The attributes that the object must have."""

    def build(self, model: Any) -> Engine:
        """The engine for `model`; raises `ConfigError` if the class refuses its keys or lacks an attribute."""
        engine: Any = self.make(model)
        for name in self.counts:
            value = getattr(engine, name, None)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                what = f"is {value!r}" if hasattr(engine, name) else "is missing"
                raise self._refuse(
                    f"makes a {type(engine).__name__} whose {name} {what}: an engine has {', '.join(self.counts)}, "
                    "each a whole number of tokens of at least 1 (treepo.engines.Engine)"
                )
        return engine  # type: ignore[no-any-return]


EngineSettings = Annotated[
    Annotated[LocalSettings, Tag("local")]
    | Annotated[ServerSettings, Tag("server")]
    | Annotated[VLLMSettings, Tag("vllm")]
    | Annotated[CustomEngine, Tag("custom")],
    Discriminator(kind_of("local")),
    one_of("local", "server", "vllm", default="local"),
]
"""`kind` may be left out: local."""
