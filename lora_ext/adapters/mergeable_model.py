"""Adapters in the weights of a model, and out of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lora_ext import blocks
from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.adapters.merging import merge_layers, unmerge_layers, untied_text
from lora_ext.adapters.requests import changes
from lora_ext.adapters.swap import plain_layer, swap_modules
from lora_ext.adapters.ties import untie_embeddings
from lora_ext.arguments import as_flag, names_of, warn
from lora_ext.nn.transaction import Transaction


class MergeableModel(AdaptedModel):
    """Merging and unloading: part of `LoraModel`."""

    @changes
    def merge_adapter(
        self,
        adapter_names: str | Sequence[str] | None = None,
        safe_merge: bool = False,
        *,
        requantize: bool = False,
    ) -> None:
        """Adds adapters (the active ones, if None) to the weights, in all layers or in none; see
        `lora_ext.nn.Linear`. `unmerge_adapter` gives back the base bit for bit. What is merged
        stays so, with a warning if that is all.

        Layers whose weight is also another module's (tied embeddings, `layer_replication`) have one
        of their own meanwhile, which takes memory for each; a warning names them.

        Args:
            safe_merge: kept for PEFT's sake; NaN and Inf are always refused.
            requantize: quantize again what is merged into quantized weights, as they are, rounding
                it; else they are dequantised meanwhile.
        """
        as_flag(safe_merge, "LoraModel.merge_adapter", "safe_merge")
        requantize = as_flag(requantize, "LoraModel.merge_adapter", "requantize")
        if adapter_names is not None:
            adapter_names = names_of(adapter_names, "LoraModel.merge_adapter")
            self._check_names(adapter_names)
        transaction = Transaction()
        layers = list(self.adapter_layers())
        untied = merge_layers(
            self.get_base_model(), layers, transaction, adapter_names, requantize=requantize
        )
        transaction.commit()
        if untied:
            warn(untied_text(untied, "until unmerge_adapter()"))

    @changes
    def unmerge_adapter(self) -> None:
        """Gives the base's weights their places in all merged layers again; a warning says if no
        layer is merged."""
        transaction = Transaction()
        if not unmerge_layers(list(self.adapter_layers()), transaction):
            warn("LoraModel.unmerge_adapter: Already unmerged. Nothing to do.")
        transaction.commit()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: str | Sequence[str] | None = None,
        *,
        requantize: bool = False,
    ) -> nn.Module:
        """The base model with the adapters in its weights and plain layers.

        Layers whose weight was also another module's (tied embeddings, `layer_replication`) have
        one of their own then; a warning names them. If that unties the embeddings of a model of
        transformers, its config's `tie_word_embeddings` becomes False, but for the T5 family, which
        computes something else then.

        Args:
            progressbar: show one.
            safe_merge: kept for PEFT's sake; NaN and Inf are always refused, and on any error the
                model is as it was.
            adapter_names: the active ones, if None.
            requantize: layers over quantized bases become such ones again, of the base's class,
                which rounds what is merged; else nn.Linear, dequantised.
        """
        as_flag(safe_merge, "LoraModel.merge_and_unload", "safe_merge")
        requantize = as_flag(requantize, "LoraModel.merge_and_unload", "requantize")
        if adapter_names is not None:
            adapter_names = names_of(adapter_names, "LoraModel.merge_and_unload")
            self._check_names(adapter_names)
        with Transaction() as transaction:
            untied = merge_layers(
                self.get_base_model(),
                list(self.adapter_layers()),
                transaction,
                adapter_names,
                alone=True,
                requantize=requantize,
                progressbar=progressbar,
            )
            transaction.commit()
            texts = [untied_text(untied, "for good")] if untied else []
            texts += self._unload(transaction)
        if texts:
            warn("; ".join(texts))
        return self.get_base_model()

    def unload(self) -> nn.Module:
        """The base model with plain layers: without the adapters, or with what is merged. Modules
        to save are the active adapter's. As for `merge_and_unload`, the config of a model of
        transformers says so, and a warning does, if its embeddings are no longer tied."""
        with Transaction() as transaction:
            texts = self._unload(transaction)
        for text in texts:
            warn(text)
        return self.get_base_model()

    def _unload(self, transaction: Transaction) -> list[str]:
        """Makes layers and config plain; what to warn of, if anything."""
        plain: dict[int, nn.Module] = {}
        for _, layer in self.lora_layers():
            plain[id(layer)] = plain_layer(layer)
        for _, module in self.saved_modules():
            plain[id(module)] = module.active_module
        for _, wrapper in self.token_modules():
            plain[id(wrapper)] = wrapper.original_module
        swap_modules(self.get_base_model(), plain, transaction)
        transaction.commit()
        if blocks.are_fused():
            blocks.unfuse_blocks(self.get_base_model())
        if hasattr(getattr(self.get_base_model(), "config", None), "quantization_config"):
            from lora_ext.quant.in_transformers import tell_dense  # only now: few need it

            tell_dense(self.get_base_model())
        if untie_embeddings(self.get_base_model(), transaction):
            return ["the config's tie_word_embeddings is False now, as the weights differ"]
        return []
