"""Configuration, as users import it."""

from flexkv.common.config_cache import GB, MB, CacheConfig, CacheSizes
from flexkv.common.config_model import LayerGroup, ModelConfig

__all__ = ["GB", "MB", "CacheConfig", "CacheSizes", "LayerGroup", "ModelConfig"]
