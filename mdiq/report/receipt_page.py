"""The part of every page that says where its figures come from."""

from collections.abc import Iterator

from mdiq.report.page import Block, Document, Heading, Paragraph, Table, Text, Value, Words, nouns

_BUSY = 0.5
"""More load than this for each core may change figures."""


_NAMES = {
    "cpu": ("processor", "プロセッサ"),
    "cores": ("cores", "コア数"),
    "kernel": ("kernel", "カーネル"),
    "python": ("Python", "Python"),
    "nodes": ("nodes", "ノード数"),
    "few": ("nodes of the first stages", "最初の段階のノード数"),
    "users": ("users at once", "同時利用者数"),
    "prompt_tokens": ("tokens of a prompt", "プロンプトのトークン数"),
    "answer_tokens": ("tokens of an answer", "回答のトークン数"),
    "example_tokens": ("tokens of the example for KV memory", "KVメモリの例のトークン数"),
    "weights": ("format of the weights", "重みの形式"),
    "dtype": ("number format", "数値形式"),
    "seed": ("seed", "乱数の種"),
    "keep_going": ("goes on after a stage that did not pass", "不合格後も続行"),
    "drill_node": ("node of the drill, if named", "訓練の対象ノード（指定時）"),
    "is_local": ("nodes on this machine", "このマシン上のノード"),
    "threads_per_node": ("threads of a node", "ノードのスレッド数"),
    "cpu_per_node": ("cores of a node", "ノードのコア数"),
    "link": ("condition of the hops", "ホップの条件"),
    "lengths": ("tokens before the counted one", "計数時の直前までのトークン数"),
    "wires": ("formats of the hops", "ホップの形式"),
}
"""Names of the machine and the settings in the document, in English and Japanese."""


def receipt_blocks(document: Document, words: Words) -> Iterator[Block]:
    """Yield the receipt: machine, command, commit, settings."""
    yield Heading(words.say("Receipt", "計測の記録"))
    rows: list[tuple[Text, ...]] = [
        (words.say("command", "コマンド"), (Value("/receipt/command"),)),
        (words.say("made at", "作成日時"), (Value("/receipt/made_at"),)),
        (words.say("version of mdiq", "mdiqの版"), (Value("/receipt/mdiq"),)),
        (words.say("commit", "コミット"), _commit(document, words)),
    ]
    rows.append((words.say("load average before", "計測前の負荷平均"), (Value("/receipt/load_average", 1),)))
    rows += [(_name(name, words), (Value(f"/receipt/machine/{name}"),)) for name in document["receipt"]["machine"]]
    rows += [(_name(name, words), _setting(name, value)) for name, value in document["settings"].items()]
    yield Table((words.say("what", "項目"), words.say("value", "値")), tuple(rows))
    yield Paragraph(
        words.say(
            "Each figure of this page is a place in the JSON beside it (also inside this file), with the raw counts.",
            "この資料の数値はすべて、付属のJSON（このファイルにも内蔵）の値であり、生の計数もそこにある。",
        ),
        "note",
    )


def busy_warning(document: Document, words: Words) -> Iterator[Block]:
    """Yield a warning where other programs had kept the machine busy."""
    if document["receipt"]["load_average"] > _BUSY * document["receipt"]["machine"]["cores"]:
        yield Paragraph(
            words.say(
                "Other programs kept this machine busy before the measurement (load average {load} on {cores} cores): "
                "speeds may be too low, and predictions off.",
                "計測前から他のプログラムがこのマシンを使っていた（{cores}コアで負荷平均{load}）。"
                "速度は低めに、予測は不正確に出ている可能性がある。",
                load=Value("/receipt/load_average", 1),
                cores=Value("/receipt/machine/cores"),
            ),
            "bad",
        )


def early_warning(document: Document, words: Words) -> Iterator[Block]:
    """Yield a warning for each stage of a trial whose rate of all users is one of some of them."""
    for i, stage in enumerate(document["stages"]):
        if stage["many"]["ended_early"]:
            yield Paragraph(
                words.say(
                    f"On {{n}} {nouns(stage['nodes'], 'device')} {{early}} of {{users}} users had their whole answer "
                    "before all had a first token: tokens/s of all users are those of fewer. Give more --answer-tokens "
                    "or fewer --users.",
                    "{n}台では、利用者{users}人のうち{early}人が、全員に最初のトークンが届く前に回答を終えた。"
                    "「全員」の速度はより少ない利用者の値である。--answer-tokensを増やすか--usersを減らすこと。",
                    n=Value(f"/stages/{i}/nodes"),
                    early=Value(f"/stages/{i}/many/ended_early"),
                    users=Value(f"/stages/{i}/many/users"),
                ),
                "bad",
            )


def _name(name: str, words: Words) -> Text:
    return words.say(*_NAMES[name]) if name in _NAMES else (name,)


def _commit(document: Document, words: Words) -> Text:
    receipt = document["receipt"]
    if not receipt["commit"]:
        return words.say("not known: the sources are not a Git checkout", "不明（ソースがGitの作業コピーではない）")
    changed = words.say(", with changes", "（変更あり）") if receipt["is_changed"] else ()
    return (Value("/receipt/commit"), *changed)


def _setting(name: str, value: object) -> Text:
    if not isinstance(value, list):
        return (Value(f"/settings/{name}", 0 if isinstance(value, int) else 3),)
    pieces: list[Value | str] = []
    for i in range(len(value)):
        pieces += [", "] if i else []
        pieces.append(Value(f"/settings/{name}/{i}"))
    return tuple(pieces)
