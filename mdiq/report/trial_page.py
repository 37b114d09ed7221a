"""The page of a trial, in English or Japanese: verdict, summary, stages and gates.

The rest is in trial_sections.py and trial_advice.py."""

from collections.abc import Iterator
from typing import Any

from mdiq.report.evaluation_page import MIB
from mdiq.report.page import (
    Block,
    Chart,
    Document,
    Heading,
    Kind,
    Language,
    Page,
    Paragraph,
    Point,
    Series,
    Table,
    Text,
    Value,
    Words,
    look_up,
    nouns,
)
from mdiq.report.receipt_page import busy_warning, early_warning, receipt_blocks
from mdiq.report.trial_advice import Advice
from mdiq.report.trial_sections import PERCENT, Sections, stage_name


def trial_page(document: Document, language: Language) -> Page:
    """Return the page of a trial's document."""
    words = Words(language)
    sections, advice = Sections(document, words), Advice(document, words)
    blocks: list[Block] = [
        *_summary(document, words),
        *_what(document, words),
        *busy_warning(document, words),
        *early_warning(document, words),
        *_stages(document, words),
        *sections.memory(),
        *sections.wire(),
        *sections.devices(),
        *sections.recovery(),
        *advice.cost(),
        *advice.outlook(),
        *advice.rules(),
        *receipt_blocks(document, words),
        *advice.not_shown(),
    ]
    return Page(
        language,
        words.word("Trial of a ring of devices", "デバイスリングの試行報告"),
        words.say("{model}, {made}", "{model}、{made}", model=Value("/model/name"), made=Value("/receipt/made_at")),
        _verdict(document, words),
        tuple(blocks),
    )


def _verdict(document: Document, words: Words) -> Paragraph:
    verdict, by = document["recommendation"]["verdict"], document["recommendation"]["by"]
    kind: Kind = "bad" if verdict == "stop" else "good" if verdict == "ring" else "note"
    if verdict == "copies":
        return Paragraph(
            words.say(
                "A ring is the wrong answer here: the model fits one device. A whole copy on each of the {n} devices "
                "reaches {copies} tokens/s where the ring reached {ring}.",
                "この用途にリングは適さない。モデルは一台に収まり、{n}台それぞれに全体のコピーを置けば毎秒{copies}トークンとなる"
                "（リングは{ring}）。",
                n=Value("/copies/devices"),
                copies=Value("/copies/tokens_per_s", 1),
                ring=Value("/facts/ring_tokens_per_s", 1),
            ),
            kind,
        )
    if verdict == "stop":
        reason = {
            "answers": words.word("answers differed from those of one device", "回答が一台での回答と異なった"),
            "recovery": words.word(
                "requests were lost or answered differently when a device failed",
                "デバイス故障時に、要求が失われたか回答が変わった",
            ),
        }.get(by, words.word("the first stage did not pass its gates", "最初の段階が関門を通らなかった"))
        return Paragraph(
            words.say(f"Do not go on as it is: {reason}.", f"現状のままでは進められない：{reason}。"), kind
        )
    at = f"/stages/{document['recommendation']['stage']}"
    devices = nouns(look_up(document, f"{at}/nodes"), "device")
    values = {"n": Value(f"{at}/nodes"), "rate": Value(f"{at}/many/figures/decode_tokens_per_s", 1)}
    if verdict == "stay":
        return Paragraph(
            words.say(
                f"Stay with the ring of {{n}} {devices} ({{rate}} tokens/s): a later stage did not pass its gates.",
                "{n}台のリング（毎秒{rate}トークン）にとどまる。その後の段階は関門を通らなかった。",
                **values,
            ),
            kind,
        )
    if document["alone"] is None:
        return Paragraph(
            words.say(
                f"The ring of {{n}} {devices} passed every gate as it stands: {{rate}} tokens/s. Whether whole copies "
                "of the model would be better was not measured.",
                "{n}台のリングは現状で全関門を通過した：毎秒{rate}トークン。"
                "モデル全体のコピーの方が良いかどうかは計測していない。",
                **values,
            ),
            kind,
        )
    return Paragraph(
        words.say(
            "Go on with all {n} devices in one ring: {rate} tokens/s, every gate passed, and one device does not hold "
            "the model or would not be faster as a copy.",
            "{n}台すべてを一つのリングで使う：毎秒{rate}トークン。全関門を通過し、"
            "一台ではモデルを保持できないか、コピーにしても速くならない。",
            **values,
        ),
        kind,
    )


def _summary(document: Document, words: Words) -> Iterator[Block]:
    last = f"/stages/{len(document['stages']) - 1}"
    currency = f" {document['prices']['currency']}"
    rows: list[tuple[Text, ...]] = [
        (
            words.say("tokens/s of the largest ring, all users", "最大のリングの速度（全利用者、トークン/秒）"),
            (Value(f"{last}/many/figures/decode_tokens_per_s", 1),),
        ),
        (
            words.say("tokens/s of one user alone there", "同、利用者一人のとき"),
            (Value(f"{last}/one/figures/decode_tokens_per_s", 1),),
        ),
        (
            words.say("seconds between two tokens of a user", "次のトークンまでの秒数（中央値）"),
            (Value(f"{last}/many/figures/itl_median_s", 3),),
        ),
        (
            words.say("users whose tokens are those of one device", "一台での回答と一致した利用者"),
            (Value(f"{last}/equal"), " / ", Value(f"{last}/many/users")),
        ),
    ]
    if document["alone"] is not None:
        rows += [
            (
                words.say(
                    "tokens/s of one device with the whole model, all users",
                    "一台にモデル全体を置いた場合の速度（全利用者）",
                ),
                (Value("/alone/many/figures/decode_tokens_per_s", 1),),
            ),
            (
                words.say("tokens/s of whole copies on all devices", "全デバイスにコピーを置いた場合の速度"),
                (Value("/copies/tokens_per_s", 1),),
            ),
        ]
    stage = document["recommendation"]["stage"]
    if stage is not None and stage != len(document["stages"]) - 1:
        rows.append(
            (
                words.say("tokens/s of the recommended ring, all users", "推奨するリングの速度（全利用者）"),
                (Value(f"/stages/{stage}/many/figures/decode_tokens_per_s", 1),),
            )
        )
    if document["stages"][-1]["drill"] is not None:
        rows.append(
            (
                words.say(
                    "seconds until all went on after a device was killed", "デバイス停止後、全要求の再開までの秒数"
                ),
                (Value(f"{last}/drill/recovered_s", 1),),
            )
        )
    cost = "/copies_cost" if document["recommendation"]["verdict"] == "copies" else "/cost"
    for pointer, en, ja, digits, unit in (
        (f"{cost}/per_million", "cost of a million tokens", "百万トークンの費用", 3, currency),
        (f"{cost}/payback_days", "days until the devices have paid for themselves", "投資回収までの日数", 0, ""),
    ):
        if look_up(document, pointer) is not None:
            rows.append((words.say(en, ja), (Value(pointer, digits, unit=unit),)))
    yield Table((words.say("summary", "概要"), words.say("figure", "値")), tuple(rows))


def _what(document: Document, words: Words) -> Iterator[Block]:
    yield Heading(words.say("What was measured", "計測の対象"))
    num_users = document["settings"]["users"]
    ask = f"{nouns(num_users, 'user')} {'asks' if num_users == 1 else 'ask at once'}"
    if document["alone"] is None:
        devices = nouns(document["stages"][0]["nodes"], "device")
        yield Paragraph(
            words.say(
                f"{{model}} on the running ring of {{n}} {devices} at {{url}}. {{users}} {ask} with prompts of "
                "{prompt} random tokens; each gets {answer} tokens, greedy, and was asked alone afterwards. Rates are "
                "those of decoding.",
                "{url}で稼働中の{n}台のリング上の{model}。{users}人の利用者が同時に{prompt}トークンの乱数プロンプトを送り、"
                "それぞれ{answer}トークンを貪欲法で受け取る（その後、一人ずつでも計測）。速度はデコード中の値。",
                model=Value("/model/name"),
                n=Value("/stages/0/nodes"),
                url=Value("/settings/url"),
                users=Value("/settings/users"),
                prompt=Value("/settings/prompt_tokens"),
                answer=Value("/settings/answer_tokens"),
            )
        )
        return
    link = (
        words.say("Every hop was slowed: {link}. ", "各ホップの条件：{link}。", link=Value("/settings/link"))
        if document["settings"]["link"]
        else words.say("Hops were not slowed. ", "ホップは遅くしていない。")
    )
    cpu = (
        words.say(
            "Each node had {cpu} cores of CPU time. ",
            "各ノードのCPU時間は{cpu}コア分。",
            cpu=Value("/settings/cpu_per_node", 2),
        )
        if document["settings"]["cpu_per_node"]
        else ()
    )
    yield Paragraph(
        words.say(
            "{model}: {layers} layers, hidden size {hidden}, {heads} query heads and {kv} KV heads. Up to {nodes} node "
            f"processes on one machine. {{users}} {ask} with prompts of {{prompt}} random tokens; each gets "
            "{answer} tokens, greedy. Rates are those of decoding. ",
            "{model}：{layers}層、隠れ次元{hidden}、クエリヘッド{heads}、KVヘッド{kv}。一台のマシンの上の最大{nodes}個のノードプロセス。"
            "{users}人の利用者が同時に{prompt}トークンの乱数プロンプトを送り、それぞれ{answer}トークンを貪欲法で受け取る。"
            "速度はデコード中の値。",
            model=Value("/model/name"),
            layers=Value("/model/num_layers"),
            hidden=Value("/model/hidden_size"),
            heads=Value("/model/num_heads"),
            kv=Value("/model/num_kv_heads"),
            nodes=Value("/settings/nodes"),
            users=Value("/settings/users"),
            prompt=Value("/settings/prompt_tokens"),
            answer=Value("/settings/answer_tokens"),
        )
        + link
        + cpu
    )
    if document["model"]["is_random"]:
        yield Paragraph(
            words.say(
                "The weights are random: speed, memory and bytes are those of the model's shape; texts mean nothing.",
                "重みは乱数である。速度・メモリ・通信量はモデルの形状で決まり、文章に意味はない。",
            ),
            "note",
        )


def _stages(document: Document, words: Words) -> Iterator[Block]:
    yield Heading(words.say("The stages", "段階"))
    places = [("/alone", document["alone"])] if document["alone"] is not None else []
    places += [(f"/stages/{i}", stage) for i, stage in enumerate(document["stages"])]
    head = (
        words.say("stage", "段階"),
        words.say("layers", "層の配分"),
        words.say("tokens/s, all users", "トークン/秒（全員）"),
        words.say("predicted", "予測"),
        words.say("tokens/s, one user", "トークン/秒（一人）"),
        words.say("predicted", "予測"),
        words.say("next token, s: median", "次のトークン（秒）：中央値"),
        words.say("p95", "p95"),
        words.say("first token, s", "最初のトークン（秒）"),
        words.say("equal answers", "一致した回答"),
    )
    yield Table(head, tuple(_stage_row(words, at, stage) for at, stage in places))
    yield _rate_chart(document, words, places)
    yield _latency_chart(document, words, places)
    if len(document["stages"]) < document["num_stages"]:
        yield Paragraph(
            words.say(
                "The trial ended before its last stage: a gate did not pass.",
                "関門を通らなかったため、試行は最後の段階の前に終了した。",
            ),
            "bad",
        )
    yield Heading(words.say("Gates", "関門"), 3)
    yield Paragraph(
        words.say(
            "A stage must pass its gates before the next one begins.", "各段階は、関門を通過してから次の段階に進む。"
        )
    )
    yield _gates(document, words)


def _stage_row(words: Words, at: str, stage: dict[str, Any]) -> tuple[Text, ...]:
    split: list[Value | str] = []
    for i in range(len(stage["split"])):
        split += [", "] if i else []
        split.append(Value(f"{at}/split/{i}"))
    has_prediction = stage["predicted"] is not None
    nothing: Text = ("–",)
    return (
        (*stage_name(words, at, stage),),
        tuple(split),
        (Value(f"{at}/many/figures/decode_tokens_per_s", 2),),
        (Value(f"{at}/predicted/many", 2),) if has_prediction else nothing,
        (Value(f"{at}/one/figures/decode_tokens_per_s", 2),),
        (Value(f"{at}/predicted/one", 2),) if has_prediction else nothing,
        (Value(f"{at}/many/figures/itl_median_s", 3),),
        (Value(f"{at}/many/figures/itl_p95_s", 3),),
        (Value(f"{at}/many/figures/ttft_median_s", 2),),
        (Value(f"{at}/equal"), " / ", Value(f"{at}/many/users")),
    )


def _rate_chart(document: Document, words: Words, places: list[tuple[str, dict[str, Any]]]) -> Chart:
    return _bars(
        document,
        words,
        places,
        "throughput",
        words.word("Tokens per second, measured beside predicted", "速度：計測と予測"),
        words.word("tokens/s", "トークン/秒"),
        (
            ("many/figures/decode_tokens_per_s", words.word("all users, measured", "全員、計測"), False),
            ("predicted/many", words.word("all users, predicted", "全員、予測"), True),
            ("one/figures/decode_tokens_per_s", words.word("one user, measured", "一人、計測"), False),
            ("predicted/one", words.word("one user, predicted", "一人、予測"), True),
        ),
    )


def _latency_chart(document: Document, words: Words, places: list[tuple[str, dict[str, Any]]]) -> Chart:
    return _bars(
        document,
        words,
        places,
        "latency",
        words.word("Seconds between two tokens of a user", "次のトークンまでの秒数"),
        words.word("seconds", "秒"),
        (
            ("many/figures/itl_median_s", words.word("median, measured", "中央値、計測"), False),
            ("many/figures/itl_p95_s", words.word("95th percentile, measured", "95パーセンタイル、計測"), False),
            ("predicted/token_s", words.word("predicted", "予測"), True),
        ),
    )


def _bars(
    document: Document,
    words: Words,
    places: list[tuple[str, dict[str, Any]]],
    name: str,
    title: str,
    label: str,
    parts: tuple[tuple[str, str, bool], ...],
) -> Chart:
    series = []
    for part, text, is_predicted in parts:
        points = []
        for at, stage in places:
            if part.startswith("predicted") and stage["predicted"] is None:
                continue
            value = Value(f"{at}/{part}", 3)
            points.append(Point(Sections.label(words, stage), float(look_up(document, value.pointer)), value))
        series.append(Series(text, tuple(points), is_predicted))
    return Chart(name, title, words.word("stage", "段階"), label, tuple(series), "bar")


def _gates(document: Document, words: Words) -> Table:
    names = {
        "answers": words.say("equal answers", "回答の一致"),
        "prediction": words.say("measured over predicted", "計測／予測"),
        "throughput": words.say("tokens/s", "トークン/秒"),
        "gain": words.say("tokens/s over those of the stage before", "前の段階との速度比"),
        "memory": words.say("memory of the largest device, MiB", "最大のデバイスのメモリ（MiB）"),
        "latency": words.say("next token, s (p95)", "次のトークン（秒、p95）"),
        "recovery answers": words.say("equal answers in the drill", "訓練での回答の一致"),
        "recovery": words.say("seconds until all went on in the drill", "訓練で全要求が再開するまでの秒数"),
    }
    rows = []
    for i, stage in enumerate(document["stages"]):
        for j, gate in enumerate(stage["gates"]):
            at = f"/stages/{i}/gates/{j}"
            scale, digits, unit = 1.0, 2, ""
            if gate["name"] in ("answers", "recovery answers"):
                scale, digits, unit = PERCENT, 0, " %"
            elif gate["name"] == "memory":
                scale, digits = MIB, 0
            bound = words.say("at least ", "下限 ") if gate["is_minimum"] else words.say("at most ", "上限 ")
            rows.append(
                (
                    (*stage_name(words, f"/stages/{i}", stage),),
                    names[gate["name"]],
                    (Value(f"{at}/value", digits, scale, unit),),
                    (*bound, Value(f"{at}/limit", digits, scale, unit)),
                    words.say("passed", "通過") if gate["passes"] else words.say("NOT PASSED", "不通過"),
                )
            )
    head = (
        words.say("stage", "段階"),
        words.say("gate", "関門"),
        words.say("value", "値"),
        words.say("limit", "基準"),
        words.say("result", "結果"),
    )
    return Table(head, tuple(rows))
