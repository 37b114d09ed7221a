"""How long a prompt takes to its first token when it has the Ring to itself.

The chunks follow each other through the Stages: Stage i begins with chunk j when it has done chunk j - 1 and Stage
i - 1 has sent chunk j. The last chunk's last row then returns to the Starter, whose head is part of its own time.
"""

from mdiq.core.ring_settings import RingSettings
from mdiq.core.scheduler import chunk_alone
from mdiq.core.types import RingSpec
from mdiq.plan.pace import PaceSettings, paced
from mdiq.plan.plan import Plan

_USUAL = RingSettings()


def first_token_s(plan: Plan, prompt_tokens: int) -> float:
    """Return the seconds from the first chunk of a prompt to its first token, in a Ring that is idle otherwise."""
    chunks = prompt_chunks(plan, prompt_tokens)
    ready_s = [0.0] * len(chunks)  # when each chunk has arrived at the Stage
    for i, stage in enumerate(plan.stages):
        done_s = 0.0
        for j, length in enumerate(chunks):
            done_s = max(done_s, ready_s[j]) + stage.cost.prompt.seconds(length)
            ready_s[j] = done_s
        if i < len(plan.stages) - 1:
            hop, sent_s = plan.hops[i], 0.0
            for j, length in enumerate(chunks):
                sent_s = max(sent_s, ready_s[j]) + hop.send.seconds(length)
                ready_s[j] = sent_s + hop.delay_s
    last_hop_s = plan.hops[-1].delay_s + plan.hops[-1].send.seconds(1) if plan.hops else 0.0
    return ready_s[-1] + last_hop_s


def prompt_chunks(plan: Plan, prompt_tokens: int) -> list[int]:
    """Return the lengths of the chunks in which the Ring would compute the prompt."""
    spec = RingSpec(num_stages=len(plan.stages), kv_tokens=max(plan.kv_tokens, 1), context_tokens=prompt_tokens + 1)
    costs = [stage.cost for stage in plan.stages]
    spec, _ = paced(spec, costs, plan.hops_s, PaceSettings(max_live=1), [hop.send for hop in plan.hops])
    length = min(max(chunk_alone(spec, prompt_tokens), 1), _USUAL.chunk_tokens)
    whole, rest = divmod(prompt_tokens, length)
    return [length] * whole + ([rest] if rest else [])
