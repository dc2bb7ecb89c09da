"""Every setting of every verb: typed, with help text, default and range. conf/ holds values for these fields only.

`verbs.py` has one dataclass a verb (`TrainSftConfig`, ...), built from the shared ones in the files beside it.
`compose.py` turns a command line into one of them and checks the ranges given here; Python code builds them itself.
Others import all names from here.
"""

from nemo_steerlm.config.checks import check_inference, check_trainable, default_rate
from nemo_steerlm.config.compute import ComputeConfig, ParallelConfig, ProcessesConfig
from nemo_steerlm.config.data import DataConfig, PolicyDataConfig
from nemo_steerlm.config.model import (
    FAMILIES,
    HEADS,
    LORA_TARGETS,
    Architecture,
    LoRAConfig,
    ModelConfig,
    RegressorModelConfig,
    RopeScaling,
)
from nemo_steerlm.config.prompt import AttributeOptions, AttributesConfig, TemplateConfig
from nemo_steerlm.config.training import LoggingConfig, LossConfig, OptimizerConfig, TrainerConfig
from nemo_steerlm.config.verbs import (
    PREPARE_SOURCES,
    AnnotateConfig,
    BootstrapConfig,
    BootstrapDataConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    ImportConfig,
    PreferenceConfig,
    PrepareConfig,
    QuickstartConfig,
    QuickstartRecipe,
    SampleConfig,
    SamplingConfig,
    SteerabilityConfig,
    SteeringCheckConfig,
    SteeringConfig,
    TrainConfig,
    TrainRegressorConfig,
    TrainSftConfig,
)

__all__ = [
    "FAMILIES", "HEADS", "LORA_TARGETS", "PREPARE_SOURCES",
    "AnnotateConfig", "Architecture", "AttributeOptions", "AttributesConfig", "BootstrapConfig", "BootstrapDataConfig",
    "ComputeConfig", "DataConfig", "EvaluateConfig", "ExportConfig", "GenerateConfig", "ImportConfig", "LoRAConfig",
    "LoggingConfig", "LossConfig", "ModelConfig", "OptimizerConfig", "ParallelConfig", "PolicyDataConfig",
    "PreferenceConfig", "PrepareConfig", "ProcessesConfig", "QuickstartConfig", "QuickstartRecipe",
    "RegressorModelConfig", "RopeScaling", "SampleConfig", "SamplingConfig", "SteerabilityConfig",
    "SteeringCheckConfig", "SteeringConfig", "TemplateConfig", "TrainConfig", "TrainRegressorConfig", "TrainSftConfig",
    "TrainerConfig", "check_inference", "check_trainable", "default_rate",
]  # fmt: skip
