//go:build race

package routes

// under tells what the race detector makes of sizes: they are divided by it, since
// all takes ten times as long and as much memory.
const under = 10
