"""vLLM in a process of its own: reads jobs, writes what it generated.

    python vllm_worker.py jobs.json answers.json

A job has the options of an `engine`, how many `new` tokens to make, the `base`'s
prompts, `batch`, rows of `[adapter's folder, prompt]` that are asked at once, and
`refused`, folders that must not load.
"""

import gc
import json
import os
import pathlib
import sys

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 64,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 64,
    "disable_log_stats": True,
    "skip_tokenizer_init": True,
}


def done(job):
    """The answers to one job."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm, requests = LLM(**ENGINE | job["engine"]), {}
    wanted = SamplingParams(
        temperature=0,
        max_tokens=job["new"],
        logprobs=5,
        ignore_eos=True,
        detokenize=False,
    )

    def request(folder):
        if folder is None:
            return None
        given = (pathlib.Path(folder).name, len(requests) + 1, folder)
        return requests.setdefault(folder, LoRARequest(*given))

    def generated(rows):
        outs = llm.generate(
            [{"prompt_token_ids": prompt} for _, prompt in rows],
            wanted,
            lora_request=[request(folder) for folder, _ in rows],
            use_tqdm=False,
        )
        return [_shown(o.outputs[0]) for o in outs]

    # The base alone: beside adapters in one batch its rows take an adapter's slot.
    found = {"base": generated([(None, p) for p in job["base"]]), "refused": {}}
    found["batch"] = generated(job["batch"]) if job["batch"] else []
    for folder in job["refused"]:
        try:
            llm.llm_engine.add_lora(request(folder))
            found["refused"][folder] = ""
        except Exception as error:
            found["refused"][folder] = str(error)
    return found


def _shown(out):
    logprobs = [{t: x.logprob for t, x in step.items()} for step in out.logprobs]
    return {"tokens": list(out.token_ids), "logprobs": logprobs}


def main(jobs, out):
    """Runs the jobs one after the other."""
    from vllm.distributed import cleanup_dist_env_and_memory

    found = {}
    for name, job in json.loads(pathlib.Path(jobs).read_text()).items():
        found[name] = done(job)
        gc.collect()
        cleanup_dist_env_and_memory()
    pathlib.Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
