# SPDX-License-Identifier: Apache-2.0
"""Samples from where people have them, cut into batches for both sides of a bridge.

    conversation.py   a sample: turns of text, images, videos, sounds; items are opened when read
    sources.py        kinds of data sets by name: all have a length and are read by number
    messages.py       chat messages, as JSON has them, into a conversation
    llava_json.py, chat_jsonl.py, tables.py, tar_shards.py, energon.py, easy_vqa.py   the kinds
    kept_arrays.py    where samples lie in large files: found once, mapped by every rank
    token_files.py    text that is tokens already
    encoding.py       a conversation into tokens and what of them is learned
    prepared.py       tokens and rows of every sample of a source, in files that are mapped
    order.py          which sample stands where: a function of seed and position
    batches.py        a global batch cut for language and encoder replicas: pure integers
    arrays.py         what the model is called with on one rank
    shared_reads.py   items read by one rank for all that encode them
    readers.py        processes that open and decode items
    loader.py         batches ahead of time, and how long a step waited for its own
"""
