"""Teacher and student side by side on every pipeline stage, as one model of the training loop.

A stage runs its part of the teacher, without gradients, and its part of the student; what goes to the next
stage is one tensor, the student's hidden state and then the teacher's along the hidden dimension. So the
teacher's logits of a microbatch arrive on the last stage together with the student's, in the same vocabulary
shards, and any schedule works. The price: the teacher's hidden state takes room in every message, and as
zeros in the gradients that come back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mbridge_prune.distill.divergence import divergence
from mbridge_prune.errors import UserError


class Pair(nn.Module):
    """The student, with a teacher that is no part of it: not trained, not moved, not saved.

    Args:
        student: this rank's part of the Megatron model to train.
        teacher: this rank's part of the parent, at the same parallel layout.
        temperature, top_k: of `divergence`.
        lm_loss: whether the next-token loss has gradients; it is reported in any case.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, *, temperature: float, top_k: int, lm_loss: bool
    ):
        super().__init__()
        self.module = student  # Megatron looks through `.module` for what it does not find here
        self.temperature, self.top_k, self.lm_loss = temperature, top_k, lm_loss
        self._outside = (teacher.requires_grad_(False).eval(),)  # a tuple: torch registers no module in it
        for name in ("config", "model_type", "pg_collection", "vp_stage"):  # looked for here alone
            setattr(self, name, getattr(student, name, None))
        if not (student.pre_process and student.post_process):
            # The width of what is sent is no longer the config's hidden size: stages tell each other.
            self.config.variable_seq_lengths = True
        self._vocabulary_group = student.pg_collection.tp

    @property
    def teacher(self) -> nn.Module:
        return self._outside[0]

    def set_input_tensor(self, input_tensor: Any) -> None:
        """[sequence, batch, student's + teacher's hidden size] from the stage before, in a list or alone."""
        received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if received is None:
            self.module.set_input_tensor(None)
            self.teacher.set_input_tensor(None)
            return
        width = self.module.config.hidden_size
        self.module.set_input_tensor(received[..., :width].contiguous())
        self.teacher.set_input_tensor(received[..., width:].detach().contiguous())

    def forward(
        self,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Losses [2, batch, sequence] (divergence, next token) on the last stage, hidden states before it."""
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": attention_mask}
        with torch.no_grad():
            taught = self.teacher(**inputs)
        learnt = self.module(**inputs)
        if not self.module.post_process:
            return torch.cat([learnt, taught.to(learnt.dtype)], dim=-1)
        losses = divergence(
            learnt, taught, labels,
            temperature=self.temperature, top_k=self.top_k, group=self._vocabulary_group,
        )  # fmt: skip
        return torch.stack([losses.kd, losses.lm if self.lm_loss else losses.lm.detach()])

    # What is saved is the student, under the names that it has alone.

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.sharded_state_dict(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)

    def state_dict_for_save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict_for_save_checkpoint(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, **kwargs: Any) -> Any:
        return self.module.load_state_dict(state_dict, strict=strict, **kwargs)


def mark_vocabulary_shards(student: nn.Module) -> None:
    """Tells Megatron which weights of its own layers are shards, for the norm of the gradient.

    It marks them where it fills them with random numbers, and Bridge, which loads them, turns that off:
    without the marks, only rank 0's shard would count.
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

    for module in student.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)):
            for name, dim in (("weight", int(isinstance(module, RowParallelLinear))), ("bias", 0)):
                tensor = getattr(module, name, None)
                if tensor is not None and not (name == "bias" and isinstance(module, RowParallelLinear)):
                    tensor.tensor_model_parallel = True
                    tensor.partition_dim, tensor.partition_stride = dim, 1


def check_same_stage(student: nn.Module, teacher: nn.Module) -> None:
    """Refuses a pair that does not stand on the same stage with the same vocabulary shard."""
    for name in ("pre_process", "post_process", "vocab_size"):
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if ours != theirs:
            raise UserError(f"student and teacher differ in {name}: {ours} and {theirs}")
