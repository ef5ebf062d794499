"""Which kind of layer has which variants of LoRA."""

from lora_ext.nn.attention import MultiheadAttention
from lora_ext.nn.calibrated import FROM_DATA
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
    # As in PEFT: an embedding starts as it does by True, and so does a convolution by "lora_ga", an
    # attention by "eva".
    Linear.TAKES_FROM_DATA = Embedding.TAKES_FROM_DATA = frozenset(FROM_DATA)
    LoraConv.TAKES_FROM_DATA = frozenset({"lora_ga"})
    MultiheadAttention.TAKES_FROM_DATA = frozenset({"eva"})
