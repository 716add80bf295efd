"""ms-swift: ``--external_plugins FILE --tuner_type multilora``, where FILE imports this module.

``--lora_rank`` is the rank of a branch. The other ``--lora_`` options mean the same as for LoRA. Further fields of
MultiLoraConfig are JSON in the environment: ``MULTILORA='{"lora_num": 3}'``.
"""

import json
import os

from peft import LoraConfig, get_peft_model
from swift.pipelines.train.tuner import get_modules_to_save, get_target_modules
from swift.tuner_plugin import PeftTuner, tuners_map

from multilora_fast.integrations import as_multilora


class MultiLoraTuner(PeftTuner):
    @staticmethod
    def prepare_model(args, model):
        task = args.task_type.upper()
        lora = LoraConfig(
            r=args.lora_rank,
            target_modules=get_target_modules(args, model),
            target_parameters=args.target_parameters,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            bias=args.lora_bias,
            modules_to_save=get_modules_to_save(args, model, task) or None,
            use_rslora=args.use_rslora,
            use_dora=args.use_dora,
            init_lora_weights=args.init_weights,
            task_type=None if task == "EMBEDDING" else task,
        )
        return get_peft_model(model, as_multilora(lora, **json.loads(os.environ.get("MULTILORA", "{}"))))


tuners_map["multilora"] = MultiLoraTuner
