"""Every setting of every verb: typed, with help text, default and range. conf/ holds values for these fields only.

Each verb has one dataclass (`TrainSftConfig`, ...) in `train_verbs.py`, `evaluate.py` or `verbs.py`, built from the
shared ones in the other files. `compose.py` builds one from a command line, Python code builds it directly; `validate`
checks both. Other packages import all names from here, except those of `families.py`.
"""

from nemo_steerlm.config.cluster import SubmitConfig
from nemo_steerlm.config.compute import ComputeConfig, InProcesses, ParallelConfig, ProcessesConfig, check_inference
from nemo_steerlm.config.data import OVERLONG, DataConfig, PolicyDataConfig, check_dropout
from nemo_steerlm.config.evaluate import WAYS, EvaluateConfig, PreferenceConfig, SteerabilityConfig, SteeringConfig
from nemo_steerlm.config.fields import Settings, choices
from nemo_steerlm.config.model import (
    HEADS,
    LORA_TARGETS,
    Architecture,
    LoRAConfig,
    ModelConfig,
    RegressorModelConfig,
    RopeScaling,
)
from nemo_steerlm.config.plan import PlanConfig
from nemo_steerlm.config.prompt import AttributeOptions, AttributesConfig, TemplateConfig
from nemo_steerlm.config.train_verbs import (
    BootstrapConfig,
    BootstrapDataConfig,
    SteeringCheckConfig,
    TrainConfig,
    TrainRegressorConfig,
    TrainSftConfig,
    default_rate,
)
from nemo_steerlm.config.training import LoggingConfig, LossConfig, OptimizerConfig, TrainerConfig
from nemo_steerlm.config.verbs import (
    PREPARE_SOURCES,
    AnnotateConfig,
    ExperimentsConfig,
    ExportConfig,
    GenerateConfig,
    ImportConfig,
    PrepareConfig,
    PushToHubConfig,
    QuickstartConfig,
    QuickstartRecipe,
    SampleConfig,
    SamplingConfig,
)

__all__ = [
    "HEADS", "LORA_TARGETS", "OVERLONG", "PREPARE_SOURCES", "WAYS",
    "AnnotateConfig", "Architecture", "AttributeOptions", "AttributesConfig", "BootstrapConfig", "BootstrapDataConfig",
    "ComputeConfig", "DataConfig", "EvaluateConfig", "ExperimentsConfig", "ExportConfig",
    "GenerateConfig", "ImportConfig", "InProcesses",
    "LoRAConfig", "LoggingConfig", "LossConfig", "ModelConfig", "OptimizerConfig", "ParallelConfig",
    "PlanConfig", "PolicyDataConfig", "PreferenceConfig", "PrepareConfig", "ProcessesConfig", "PushToHubConfig",
    "QuickstartConfig", "QuickstartRecipe", "RegressorModelConfig", "RopeScaling", "SampleConfig", "SamplingConfig",
    "Settings", "SteerabilityConfig", "SteeringCheckConfig", "SteeringConfig", "SubmitConfig", "TemplateConfig",
    "TrainConfig", "TrainRegressorConfig", "TrainSftConfig", "TrainerConfig", "check_dropout", "check_inference",
    "choices", "default_rate",
]  # fmt: skip
