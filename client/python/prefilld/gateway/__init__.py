"""prefilld-gateway: OpenAI's HTTP interface before several prefilld, for routers and for people.

A router's prefill call (llm-d) is answered with the prefilld from which vLLM shall pull; any other request is prefilled
there, decoded by a decode worker, and streamed back. README.md has the picture.

    __main__          flags, start, drain
    app               HTTP: routes, limits, clients that leave
    openai_requests   what a request may say          openai_answers   what answers, events and errors look like
    prompts           text and chats to tokens        answer_text      tokens to text, stop strings
    routing           which prefilld                  peers            who is up, and how long the queues are
    generation        one prompt through prefilld and decode worker
    metrics           what /metrics shows
"""
