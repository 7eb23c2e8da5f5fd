"""vLLM in a process of its own: reads a job, writes what it generated.

    python vllm_worker.py job.json answers.json

The job has the `engine`'s options, the `base`'s prompts, `batches` of `[adapter's
folder, prompt]` that are asked at once, and `refused`, folders that must not load.
"""

import json
import os
import pathlib
import sys

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}

ENGINE = {
    "enforce_eager": True,
    "max_model_len": 64,
    "max_num_batched_tokens": 512,
    "disable_log_stats": True,
    "skip_tokenizer_init": True,
}


def main(job, out):
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(**ENGINE | job["engine"])
    wanted = SamplingParams(
        temperature=0,
        max_tokens=job["new"],
        logprobs=5,
        ignore_eos=True,
        detokenize=False,
    )
    requests = {}

    def request(folder):
        if folder is None:
            return None
        more = {"is_3d_lora_weight": True} if "stacked" in folder else {}
        given = (pathlib.Path(folder).name, len(requests) + 1, folder)
        return requests.setdefault(folder, LoRARequest(*given, **more))

    def generated(rows):
        outs = llm.generate(
            [{"prompt_token_ids": prompt} for _, prompt in rows],
            wanted,
            lora_request=[request(folder) for folder, _ in rows],
            use_tqdm=False,
        )
        for x in (o.outputs[0] for o in outs):
            yield {
                "tokens": list(x.token_ids),
                "logprobs": [{t: v.logprob for t, v in d.items()} for d in x.logprobs],
            }

    found = {"refused": {}}
    found["base"] = list(generated([(None, p) for p in job["base"]]))
    found["batches"] = [list(generated(rows)) for rows in job["batches"]]
    for folder in job.get("refused", ()):
        try:
            llm.llm_engine.add_lora(request(folder))
            found["refused"][folder] = ""
        except Exception as error:
            found["refused"][folder] = str(error)
    pathlib.Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(pathlib.Path(sys.argv[1]).read_text()), sys.argv[2])
