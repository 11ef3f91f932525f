# SPDX-License-Identifier: Apache-2.0
"""The transformers Trainer in fp16, with its own clipping, logging and groups: `python docs/frameworks/with_trainer.py`."""

import torch
import transformers

import mpkernels as mpk


class MPTrainer(transformers.Trainer):
    """Trainer with our scaler. `fp16` stays off: the converted model casts by itself."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = mpk.GradScaler()
        self.accelerator.clip_grad_norm_ = self._clip

    def _clip(self, parameters, max_norm, norm_type=2) -> torch.Tensor:
        return self.accelerator.scaler.clip_grad_norm_(self.optimizer.optimizer, max_norm)  # the factor is left to the step


def main(steps: int = 30, folder: str = "trainer_output") -> list[dict[str, float]]:
    """Train a small BERT to tell whether a sequence begins with a large token; what Trainer logged, a row per step."""
    sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    model = mpk.convert(model, "mixed_float16")
    tokens = torch.randint(32, (8 * steps, 6))
    data = [{"input_ids": row, "labels": int(row[0] >= 16)} for row in tokens]
    args = transformers.TrainingArguments(folder, num_train_epochs=1, logging_steps=1, save_strategy="no", report_to="none")
    optimizer = (mpk.optim.AdamW, {"lr": 3e-3})
    trainer = MPTrainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=optimizer)
    trainer.train()
    return [row for row in trainer.state.log_history if "grad_norm" in row]


if __name__ == "__main__":
    main()
