"""Which kind of layer has which variants of LoRA."""

from lora_ext.nn.conv import LoraConv
from lora_ext.nn.dora import ConvDora, EmbeddingDora, LinearDora
from lora_ext.nn.embedding import Embedding
from lora_ext.nn.linear import Linear


def give_variants() -> None:
    """Tells the layers, which do not know the variants."""
    Linear.VARIANTS = (LinearDora(),)
    LoraConv.VARIANTS = (ConvDora(),)
    Embedding.VARIANTS = (EmbeddingDora(),)
    Linear.TAKES_MICA = Embedding.TAKES_MICA = True
