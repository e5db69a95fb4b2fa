"""prefilld-gateway: OpenAI's HTTP interface before several prefilld, for routers and for people.

A router's prefill call (llm-d) is answered with the prefilld from which vLLM shall pull; any other request is prefilled
there, decoded by a decode worker, and streamed back. README.md has the picture.

    __main__, settings   start, drain; flags
    app, exchange        HTTP: routes; one request: limits, streams of events, clients that leave
    timed_http           connections over which no request comes
    bodies               bodies of requests within their bounds; threads and a process beside the event loop
    service              a request that was read: a prefill call is told a prefilld, any other is answered
    openai_requests      what a request may say
    openai_answers       what answers, events and errors look like
    prompts              text and chats to tokens
    answer_text          tokens to text, stop strings
    routing, peers       which prefilld; who is up, how long the queues are, what the caches hold
    generation           one prompt through prefilld and decode worker
    metrics              the page /metrics
"""
