"""`ldm bench`: measures the service under load, over HTTP.

    ldm bench                                   the bundled model, on a server of its own, 16 clients
    ldm bench --url http://host:8000            a server that is already running
    ldm bench --rate 2.5 --seconds 60           open loop: Poisson arrivals, 2.5 requests/s for 60 s
    ldm bench --against-solo --bare             what batching gains, and what HTTP costs
    ldm bench --json run.json --chart run.png   write the results, and a chart of them
    ldm bench --mix mix.toml                    your own mix of requests:

    [[requests]]                # one kind of request; in JSON: {"requests": [{...}, ...]}
    weight = 3                  # how often it is drawn, relative to the sum of all weights
    task = "text-to-image"      # or image-to-image or inpainting, if the model supports them
    steps = 20                  # steps, guidance_scale, strength: the model's default if missing
    guidance_scale = 1          # 1: no guidance
    n = 1
    controls = 1                # and reference_images = 1: how many, of those that the server has
    width = 1.5                 # times the model's default, rounded to a size that it supports
    height = 1.0

The same --seed draws the same requests. Throughput is measured from the first request to the last response,
which includes the end of the run, when fewer requests than clients are left: send many more requests than
there are clients. Compare two runs only if nothing else used the machine.
"""
