"""Sections of a trial's page that weigh it: cost, one more device, rules, and what it does not show."""

from collections.abc import Iterator

from mdiq.report.page import Block, Bullets, Document, Heading, Paragraph, Table, Text, Value, Words, nouns
from mdiq.report.trial_sections import PERCENT

_DIGITS = {"all": 0, "some": 0, "none": 0, "price": 3}
"""Of the figures that a rule compared, where there are not two: stages are counted; a cost is as in its table."""


class Advice:
    """The sections of one document."""

    def __init__(self, document: Document, words: Words) -> None:
        self._document, self._words = document, words

    def cost(self) -> Iterator[Block]:
        words, document = self._words, self._document
        yield Heading(words.say("Energy and cost", "電力と費用"))
        if document["cost"]["watts"] is None:
            yield Paragraph(
                words.say(
                    "Energy: not measured. This machine does not tell it, and no wattage was given (--watts).",
                    "電力：計測していない。このマシンからは得られず、指定もない（--watts）。",
                ),
                "note",
            )
        else:
            source = (
                words.say("as given for each device", "デバイスごとの指定値から")
                if document["prices"]["watts"] is not None
                else words.say("measured on this machine", "このマシンでの計測値")
            )
            yield Paragraph(
                words.say(
                    "Energy: {watts} W for all devices together (",
                    "電力：全デバイス合計{watts} W（",
                    watts=Value("/cost/watts", 1),
                )
                + source
                + words.say(
                    "), {joules} J for a token.",
                    "）、トークンあたり{joules} J。",
                    joules=Value("/cost/joules_per_token", 2),
                )
            )
        if document["prices"]["device_cost"] is None and document["cost"]["kwh_per_million"] is None:
            yield Paragraph(words.say("Cost: no prices were given.", "費用：価格の指定がない。"), "note")
            return
        unit = f" {document['prices']['currency']}"
        names = (
            ("load_share", words.say("share of the time in use", "稼働率"), 0, PERCENT, " %"),
            ("kwh_per_million", words.say("kWh for a million tokens", "百万トークンのkWh"), 2, 1.0, ""),
            ("power_per_million", words.say("power", "電力費"), 3, 1.0, unit),
            ("devices_per_million", words.say("devices", "機器費"), 3, 1.0, unit),
            ("per_million", words.say("together", "合計"), 3, 1.0, unit),
            ("payback_days", words.say("paid back after days", "回収日数"), 0, 1.0, ""),
        )
        devices = nouns(document["cost"]["devices"], "device")
        places = {"/cost": words.say(f"the ring of {{n}} {devices}", "{n}台のリング", n=Value("/cost/devices"))}
        if document["copies_cost"] is not None and document["memory"]["num_copies"]:
            places["/copies_cost"] = words.say("whole copies", "コピー")
        places |= {
            f"/costs/{i}": words.say("the ring, for comparison", "リング（比較）")
            for i in range(len(document["costs"]))
        }
        rows = tuple(
            (
                name,
                *((Value(f"{place}/{key}", digits, scale, suffix),) for key, _, digits, scale, suffix in names),
            )
            for place, name in places.items()
        )
        yield Table((words.say("a million tokens", "百万トークン"), *(name for _, name, *_ in names)), rows)
        text = words.say(
            "Devices are paid for over {years} years, whether they compute or not, and take their power all the time. ",
            "機器費は稼働の有無によらず{years}年で償却し、電力は常時消費するとした。",
            years=Value("/prices/lifetime_years", 1),
        )
        if document["prices"]["per_million_tokens"] is not None:
            text += words.say(
                "Elsewhere a million tokens cost {price}. Days to pay back assume that all tokens would be "
                "bought there.",
                "外部サービスの価格は百万トークンあたり{price}。回収日数は、全トークンをそこで買う場合との比較である。",
                price=Value("/prices/per_million_tokens", 2, unit=unit),
            )
            if document["cost"]["per_million"] is not None and document["cost"]["payback_days"] is None:
                text += words.say(
                    " The ring never pays back at this rate: its power alone costs as much.",
                    "この稼働率では、電力費だけで外部サービスの価格以上となり、投資は回収できない。",
                )
        yield Paragraph(text)

    def outlook(self) -> Iterator[Block]:
        words, outlook = self._words, self._document["outlook"]
        yield Heading(words.say("What one more device would bring", "デバイスを一台増やした場合"))
        if outlook is None:
            why = self._document["why_no_outlook"]
            text = words.say("The planner has nothing to go by. ", "計画に必要な計測がない。")
            yield Paragraph(text + ((Value("/why_no_outlook"),) if why else ()), "note")
            return
        rows = []
        for i, more in enumerate(outlook["one_more"]):
            at = f"/outlook/one_more/{i}"
            rate: Text = (Value(f"{at}/why"),) if more["rate"] is None else (Value(f"{at}/rate", 2),)
            rows.append(
                (
                    words.say("one more like {name}", "{name}と同種を一台追加", name=Value(f"{at}/name")),
                    rate,
                    (Value(f"/outlook/gains/{i}", 2),),
                )
            )
        head = (
            words.say("predicted", "予測"),
            words.say("tokens/s, all users", "トークン/秒（全員）"),
            words.say("over {rate}", "{rate}との比", rate=Value("/outlook/planned", 2)),
        )
        yield Table(head, tuple(rows))
        if outlook["left_out"]:
            names: list[Value | str] = []
            for i in range(len(outlook["left_out"])):
                names += [", "] if i else []
                names.append(Value(f"/outlook/left_out/{i}"))
            yield Paragraph(
                words.say(
                    "For these users the planner would leave out: ", "この利用者数では、プランナーが使わないデバイス："
                )
                + tuple(names)
            )
        limits = {
            "compute": words.say("the computing of {where}", "{where}の計算", where=Value("/outlook/limit")),
            "hop": words.say("the hop {where}", "ホップ {where}", where=Value("/outlook/limit")),
            "memory": words.say("the memory of {where}", "{where}のメモリ", where=Value("/outlook/limit")),
        }
        yield Paragraph(
            words.say(
                "The planner says: the model needs at least {n} of these devices. The ring is limited by ",
                "プランナーによれば、このモデルには最低{n}台が必要である。リングの速度を決めているのは",
                n=Value("/outlook/num_needed"),
            )
            + limits[outlook["limited_by"]]
            + words.say(".", "である。")
        )

    def rules(self) -> Iterator[Block]:
        words = self._words
        yield Heading(words.say("The rules of the recommendation", "推奨の規則"))
        yield Paragraph(
            words.say(
                "Rules are applied in this order; the first with a verdict that holds decides.",
                "規則はこの順に適用し、結論を持つ規則のうち最初に成り立つものが結論を決める。",
            )
        )
        texts = {
            "answers": words.say(
                "Answers differ from those of one device: stop.", "回答が一台での回答と異なる：中止。"
            ),
            "recovery": words.say(
                "A drill did not end with the same answers: stop.", "訓練後の回答が一致しない：中止。"
            ),
            "fits": words.say(
                "The model fits one device with room to spare, and copies are at least as fast: whole copies, no ring.",
                "モデルが余裕を持って一台に収まり、コピーの方が遅くない：リングではなくコピー。",
            ),
            "all": words.say(
                "Every stage passed its gates: the ring of all devices.", "全段階が関門を通過：全台のリング。"
            ),
            "some": words.say(
                "Only the first stages passed: the ring of the last one that did.",
                "最初の数段階だけが通過：通過した最後の段階のリング。",
            ),
            "none": words.say("No stage passed: stop.", "通過した段階がない：中止。"),
            "price": words.say(
                "Advice: a million tokens cost as much as elsewhere, or more.",
                "助言：百万トークンの費用が外部サービスの価格以上である。",
            ),
            "one more": words.say("Advice: one more device is worth it.", "助言：もう一台追加する価値がある。"),
            "left out": words.say(
                "Advice: the planner would leave devices out.", "助言：プランナーは一部のデバイスを使わない。"
            ),
        }
        answers = {
            True: words.say("holds", "成立"),
            False: words.say("does not hold", "不成立"),
            None: words.say("not known", "不明"),
        }
        rows = []
        for i, rule in enumerate(self._document["recommendation"]["rules"]):
            at = f"/recommendation/rules/{i}"
            compared: Text = ("–",)
            if rule["value"] is not None and rule["limit"] is not None:
                digits = _DIGITS.get(rule["name"], 2)
                value, limit = Value(f"{at}/value", digits), Value(f"{at}/limit", digits)
                compared = (value, words.word(" against ", " 対 "), limit)
            elif rule["value"] is not None:
                compared = (Value(f"{at}/value", 0),)
            rows.append((texts[rule["name"]], answers[rule["holds"]], compared))
        head = (words.say("rule", "規則"), words.say("result", "結果"), words.say("figures", "数値"))
        yield Table(head, tuple(rows))

    def not_shown(self) -> Iterator[Block]:
        words = self._words
        yield Heading(words.say("What this does not show", "この報告が示さないこと"))
        items = [
            words.say(
                "Prompts are random tokens: nothing is said about the quality of answers.",
                "プロンプトは乱数であり、回答の品質については示さない。",
            ),
            words.say(
                "The load lasted seconds to minutes: nothing is said about heat, wear, or a day's rush hours.",
                "負荷は数秒から数分であり、発熱・劣化・一日の混雑については示さない。",
            ),
        ]
        if self._document["settings"].get("is_local"):
            items += [
                words.say(
                    "All node processes shared one machine, its memory bus and caches. Devices do not share them, and "
                    "may be slower or faster than this machine. Slow hops were made by a relay.",
                    "全ノードは一台のマシンのメモリ帯域とキャッシュを共有した。実機は共有せず、このマシンより遅いことも速いこともある。"
                    "遅いホップは中継プログラムで作った。",
                ),
                words.say(
                    "The drill killed a process, which starts again in seconds. A device without power takes longer.",
                    "訓練はプロセスの停止であり、数秒で再起動する。電源断からの復旧はより長くかかる。",
                ),
                words.say(
                    "Memory of the first device includes the program that measures. What copies would reach is "
                    "computed from what one reached with its part of the users.",
                    "最初のデバイスのメモリには計測プログラムも含まれる。"
                    "コピーの速度は、一台に利用者の一部を割り当てた計測値から算出した。",
                ),
            ]
        else:
            items.append(
                words.say(
                    "The ring was measured as it stands, from outside: no stages, no drill, and other users may have "
                    "asked at the same time.",
                    "稼働中のリングを外から計測した。段階も訓練もなく、同時に他の利用者がいた可能性がある。",
                )
            )
        items.append(
            words.say(
                "Costs leave out work, rooms, cooling and network; power is what was given or what one machine told.",
                "費用に人件費・場所・冷房・回線は含まない。電力は指定値または一台のマシンの計測値である。",
            )
        )
        yield Bullets(tuple(items))
