"""The shell around the engine: gRPC server and client, live loop, tokenizer, command line."""
